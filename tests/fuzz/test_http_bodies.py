"""JSON bodies at the gateway, through the whole application, in front of a router that answers everything.

An input is a path in a line of its own, and the body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from functools import cache
from typing import Any, cast

from hypothesis import strategies as st
from support.fuzzing import MAX_MESSAGE_CHARS, fuzzed
from support.mutations import bytes_near, json_near

from gateway.app import build_app
from gateway.cors import Cors
from gateway.edge import Edge
from gateway.upstream.routers import Routers
from moesaic.v1 import inference_pb2 as pb

SAMPLING = {
    "model": "m",
    "n": 2,
    "max_tokens": 4,
    "seed": 1,
    "stop": ["a", "b"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": -1,
    "logit_bias": {"7": 1.5},
    "stop_token_ids": [7],
    "cache_salt": "t",
    "experts": {"deny": ["0:1"], "allow": ["maths"], "top_k": 2, "on_missing": "wait"},
    "stream": True,
    "stream_options": {"include_usage": True},
    "metadata": {"a": [1, {"b": None}]},
}
MESSAGES = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": [{"type": "text", "text": "y"}]},
]
TEMPLATE = {"chat_template_kwargs": {"a": [1, {"b": None, "c": [[], {}]}]}, "add_generation_prompt": True}
BODIES: dict[str, Sequence[dict[str, Any]]] = {
    "/v1/completions": [{**SAMPLING, "prompt": "x"}, {"prompt": [[1, 2], [3]], "logprobs": 1, "echo": True}],
    "/v1/chat/completions": [
        {**SAMPLING, **TEMPLATE, "messages": MESSAGES},
        {"messages": MESSAGES, "logprobs": True},
    ],
    "/tokenize": [{"prompt": "x", "return_token_strs": True}, {"messages": MESSAGES, **TEMPLATE}],
    "/detokenize": [{"tokens": [1, 2]}],
}


def posts() -> st.SearchStrategy[bytes]:
    bodies = [
        (json_near(body) | bytes_near(json_near(body))).map((path.encode() + b"\n").__add__)
        for path, of_path in BODIES.items()
        for body in of_path
    ]
    return st.one_of(bodies)


class AnsweringRouters:
    """Takes every request as a router would: from its bytes."""

    serving = frozenset({"r"})

    async def generate(
        self, calls: Sequence[pb.GenerateRequest], request_id: str
    ) -> AsyncGenerator[tuple[int, pb.GenerateResponse], None]:
        for index, call in enumerate(calls):
            request = pb.GenerateRequest.FromString(call.SerializeToString())
            yield index, pb.GenerateResponse(prompt=pb.PromptInfo(token_ids=[1], text="x"))
            for place in range(max(1, min(request.n, 8))):
                yield (
                    index,
                    pb.GenerateResponse(
                        index=place, text="y", token_ids=[2], finish_reason=pb.FINISH_REASON_LENGTH
                    ),
                )

    async def tokenize(self, request: pb.TokenizeRequest, request_id: str) -> pb.TokenizeResponse:
        pb.TokenizeRequest.FromString(request.SerializeToString())
        return pb.TokenizeResponse(token_ids=[1], tokens=["x"], max_model_len=8)

    async def detokenize(self, request: pb.DetokenizeRequest, request_id: str) -> pb.DetokenizeResponse:
        pb.DetokenizeRequest.FromString(request.SerializeToString())
        return pb.DetokenizeResponse(text="x")


@cache
def gateway() -> Edge:
    # The routes that are asked use this part of Routers alone.
    routers = cast(Routers, AnsweringRouters())
    app = build_app(routers, max_body_bytes=1 << 20, timeout_s=60.0)
    return Edge(app, max_body_bytes=1 << 20, allowed_hosts=None, cors=Cors(frozenset()))


@fuzzed("http_bodies", posts(), examples=500)
def test_a_body_is_answered_or_refused_in_the_envelope(raw: bytes) -> None:
    path, _, body = raw.partition(b"\n")
    status, reply = asyncio.run(post(path.decode(errors="replace"), body))
    assert status in (200, 400, 404)
    if status != 200:
        error = json.loads(reply)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) <= MAX_MESSAGE_CHARS
        assert error["code"] != "internal_error"


async def post(path: str, body: bytes) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []
    waits = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not waits.is_set():
            waits.set()
            return {"type": "http.request", "body": body}
        # A client that stays until it has its answer.
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }
    await gateway()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

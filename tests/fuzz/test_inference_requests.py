"""What a gRPC client may send to a router, down to the engine, which is played."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, message_near
from support.tiny_tokenizer import byte_level, write_folder

from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.routing_table import RoutingTable, Snapshot
from moesaic.v1 import inference_pb2 as pb
from router.api.service import InferenceService, ModelFacts
from router.control.epochs import EpochBook
from router.engine.request import (
    Finished,
    FinishReason,
    PromptScored,
    SequenceRequest,
    Started,
    Timing,
    TokenGenerated,
)
from router.engine.sampling_params import SampledToken, TokenLogprobs
from router.gating.policy import LayerShape
from router.text.text import Text, load_text

HIDDEN_SIZE, NUM_SLOTS = 4, 3
MAX_MODEL_LEN, VOCAB_SIZE = 128, 420


@cache
def text() -> Text:
    with tempfile.TemporaryDirectory() as folder:
        return load_text(write_folder(Path(folder), byte_level()))


@cache
def epochs() -> EpochBook:
    """One layer of three slots, and a fourth that a bundle has added."""
    added = ExpertAddress(0, NUM_SLOTS)
    epoch = Epoch.of(
        "tiny",
        {ExpertAddress(0, slot): bytes(32) for slot in range(NUM_SLOTS + 1)},
        gate_rows={added: GateRow(bytes(4 * HIDDEN_SIZE))},
        bundles=[EpochBundle("maths-v1", bytes(32), ("maths",), (added,))],
    )
    book = EpochBook({0: LayerShape(NUM_SLOTS, 2)}, HIDDEN_SIZE)
    book.update(Snapshot(epoch, RoutingTable(1, ()), None))
    book.settle(lambda _: [], {})
    return book


class PlayedEngine:
    """Answers every sequence at once, with the same few tokens."""

    def submit(self, request: SequenceRequest) -> None:
        request.on_event(Started(0.0))
        if request.sampling.prompt_logprobs is not None:
            scored = tuple(TokenLogprobs(token, -1.0, ()) for token in request.prompt[1:])
            request.on_event(PromptScored(scored))
        end = Finished(FinishReason.LENGTH, None, Timing(0.0, 0.0, 0.0))
        for token in range(3, 3 + min(4, request.sampling.max_tokens)):
            logprobs = (
                None if request.sampling.logprobs is None else TokenLogprobs(token, -1.0, ((token, -1.0),))
            )
            request.on_event(TokenGenerated(SampledToken(token, logprobs)))
        request.on_event(end)

    def cancel(self, sequence_id: str) -> None: ...

    def pause(self, sequence_id: str) -> None: ...

    def resume(self, sequence_id: str) -> None: ...


class PlayedContext:
    """Of a call without a deadline and without metadata."""

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def add_done_callback(self, callback: object) -> None: ...

    def set_trailing_metadata(self, metadata: object) -> None: ...

    async def send_initial_metadata(self, metadata: object) -> None: ...


def service() -> InferenceService:
    return InferenceService(
        PlayedEngine(),
        text(),
        ModelFacts("tiny", "mixtral", MAX_MODEL_LEN, VOCAB_SIZE, 1, NUM_SLOTS, 2, created=1_790_000_000),
        stats=pb.GetRouterStatsResponse,
        epoch=lambda: epochs().current.id,
        choose_view=epochs().choose,
        control_address=str,
        request_timeout_s=60.0,
        on_missing="wait",
    )


SAMPLING = pb.SamplingParams(
    max_tokens=4, temperature=0.5, seed=1, stop=["hen"], stop_token_ids=[7], logit_bias={3: 1.0}, logprobs=1
)
CHAT = pb.Chat(
    messages=[pb.ChatMessage(role="user", content="hen"), pb.ChatMessage(role="assistant", content="a")]
)
CHAT.template_kwargs.update({"mood": "fine", "tools": [{"name": None, "list": [1.5, True]}]})
EXPERTS = pb.ExpertPolicy(
    deny=["0:1"], allow=["maths-v1"], require=["maths"], top_k=1, on_missing=pb.ON_MISSING_FAIL
)
GENERATE = [
    pb.GenerateRequest(request_id="r", text="Once upon", sampling=SAMPLING, n=2, experts=EXPERTS, tenant="t"),
    pb.GenerateRequest(chat=CHAT, sampling=SAMPLING, session_id="s", return_weight_versions=True),
    pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 6]),
        sampling=SAMPLING,
        epoch="e",
        resume=pb.Resume(continuations=[pb.ReceivedContinuation(token_ids=[9])]),
    ),
]
TOKENIZE = [pb.TokenizeRequest(text="hen", return_tokens=True), pb.TokenizeRequest(chat=CHAT)]
DETOKENIZE = [pb.DetokenizeRequest(token_ids=[5, 6, 7])]


def near(messages: list[Any]) -> st.SearchStrategy[bytes]:
    whole = st.one_of([message_near(message) for message in messages])
    return whole | bytes_near(whole)


def parsed(kind: Callable[[], Message], raw: bytes) -> Any:
    """None for what gRPC refuses by itself."""
    try:
        message = kind()
        message.ParseFromString(raw)
        return message
    except DecodeError:
        return None


@fuzzed("generate_requests", near(GENERATE), examples=150)
def test_a_request_is_answered_or_refused(raw: bytes) -> None:
    request = parsed(pb.GenerateRequest, raw)
    if request is not None:
        if request.epoch == "e":
            request.epoch = epochs().current.id
        with refusals():
            asyncio.run(generate(request))


async def generate(request: pb.GenerateRequest) -> None:
    async for response in service().Generate(request, PlayedContext()):
        response.SerializeToString()


@fuzzed("tokenize_requests", near(TOKENIZE), examples=60)
def test_a_text_is_tokenized_or_refused(raw: bytes) -> None:
    request = parsed(pb.TokenizeRequest, raw)
    if request is not None:
        with refusals():
            asyncio.run(ask(lambda router: router.Tokenize(request, PlayedContext()))).SerializeToString()


@fuzzed("detokenize_requests", near(DETOKENIZE), examples=30)
def test_tokens_become_a_text_or_are_refused(raw: bytes) -> None:
    request = parsed(pb.DetokenizeRequest, raw)
    if request is not None:
        with refusals():
            asyncio.run(ask(lambda router: router.Detokenize(request, PlayedContext()))).SerializeToString()


async def ask(call: Callable[[InferenceService], Any]) -> Any:
    return await call(service())

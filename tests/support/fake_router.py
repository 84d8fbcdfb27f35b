"""A router without a model: the real InferenceService over real gRPC, answers that a test can foretell.

Its tokens are the bytes of UTF-8 (id 256 ends a sequence). Continuation i repeats the prompt from its i-th token on.
The token at position p of prompt and answer has log probability `logprob_at(p)`; at odd positions another token is
more probable. What goes wrong, and when, is set by attributes; what arrived is recorded.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from moesaic import errors, rpc
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

EOS = 256
VOCAB_SIZE = 257


@dataclass
class FakeRouter(InferenceServiceServicer):
    model: str = "fake"
    epoch: str = "e1"
    max_model_len: int = 128
    parked_sequences: int = 0
    has_tokenizer: bool = True
    # The model ends its answer by itself after so many tokens.
    eos_after: int | None = None
    # Fails with this, after so many tokens of the answer.
    error: Exception | None = None
    error_after: int = 0
    # Whether the prompt comes in a message of its own, as a router sends it.
    prompt_ahead: bool = False
    # Seconds before each token.
    pace_s: float = 0.0
    # Falls silent for ever after so many tokens.
    silent_after: int | None = None
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    # Seconds that each request had when it came.
    time_left_s: list[float | None] = field(default_factory=list)
    num_running: int = 0
    num_sent: int = 0
    max_running: int = 0
    num_cancelled: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self) -> None:
        """As new: no misbehaviour, no records."""
        vars(self).update(vars(FakeRouter()))

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        self.time_left_s.append(context.time_remaining())
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            prompt = self._prompt(request)
            async for response in self._answer(request, prompt):
                yield response
        except (asyncio.CancelledError, GeneratorExit):  # while it waits, or while a message is being sent
            self.num_cancelled += 1
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:
        self._need_tokenizer()
        text = request.text if request.WhichOneof("prompt") == "text" else render(request.chat)
        ids = encode(text)
        return pb.TokenizeResponse(
            token_ids=ids, tokens=[f"<{token_id}>" for token_id in ids], max_model_len=self.max_model_len
        )

    async def Detokenize(self, request: pb.DetokenizeRequest, context: object) -> pb.DetokenizeResponse:
        self._need_tokenizer()
        self._check_ids(request.token_ids, field="token_ids")
        return pb.DetokenizeResponse(text=decode(request.token_ids))

    async def GetModelInfo(self, request: object, context: object) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            model=self.model,
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
            epoch=self.epoch,
            has_tokenizer=self.has_tokenizer,
            created=1_790_000_000,
            sampling_defaults=pb.SamplingParams(temperature=0.7, top_p=1, repetition_penalty=1),
        )

    async def GetRouterStats(self, request: object, context: object) -> pb.GetRouterStatsResponse:
        return pb.GetRouterStatsResponse(steps=3, generated_tokens=7, parked_sequences=self.parked_sequences)

    async def _answer(
        self, request: pb.GenerateRequest, prompt: list[int]
    ) -> AsyncIterator[pb.GenerateResponse]:
        head = pb.GenerateResponse(request_id=request.request_id, model=self.model, epoch=self.epoch)
        continuations = [self._continuation(request, prompt, i) for i in range(max(request.n, 1))]
        if self.error is not None and self.error_after == 0:
            raise self.error
        opening: pb.GenerateResponse | None = pb.GenerateResponse(prompt=self._prompt_info(request, prompt))
        if request.HasField("experts"):
            opening.experts.CopyFrom(request.experts)
        opening.seed = request.sampling.seed if request.sampling.HasField("seed") else 1234
        if request.HasField("resume"):
            opening = None
            for index, received in enumerate(request.resume.continuations):
                num = len(continuations[index]) if received.finished else len(received.token_ids)
                continuations[index] = continuations[index][num:]
        if opening is not None and self.prompt_ahead:
            opening.MergeFrom(head)
            yield opening
            self.num_sent += 1
            opening = None
        for step in range(max(len(tokens) for tokens in continuations)):
            await self._misbehave(step)
            for index, tokens in enumerate(continuations):
                if step < len(tokens):
                    response = pb.GenerateResponse(index=index)
                    response.MergeFrom(head)
                    response.MergeFrom(tokens[step])
                    if opening is not None:
                        response.MergeFrom(opening)
                        opening = None
                    yield response
                    self.num_sent += 1

    async def _misbehave(self, step: int) -> None:
        await asyncio.sleep(self.pace_s)
        if step == self.silent_after:
            await asyncio.sleep(3600)
        if self.error is not None and step == self.error_after:
            raise self.error

    def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        """The prompt's token ids, refused as a router refuses them."""
        if request.model and request.model != self.model:
            raise errors.NotFound("no such model", field="model", reason="MODEL_NOT_FOUND")
        ids = self._token_ids(request)
        if not ids:
            raise errors.InvalidArgument("the prompt is empty", field="prompt")
        self._check_ids(ids, field="prompt")
        if len(ids) + request.sampling.max_tokens > self.max_model_len:
            raise errors.InvalidArgument(
                f"this model's maximum context length is {self.max_model_len} tokens, the request needs"
                f" {len(ids) + request.sampling.max_tokens}",
                field="prompt",
                reason="CONTEXT_LENGTH_EXCEEDED",
            )
        if request.sampling.temperature < 0:
            raise errors.InvalidArgument("temperature must be in [0, 2]", field="temperature")
        return ids

    def _token_ids(self, request: pb.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        self._need_tokenizer()
        return encode(request.text if kind == "text" else render(request.chat))

    def _need_tokenizer(self) -> None:
        if not self.has_tokenizer:
            raise errors.InvalidArgument(
                "this model has no tokenizer: send token ids", field="prompt", reason="NO_TOKENIZER"
            )

    def _check_ids(self, ids: Iterable[int], *, field: str) -> None:
        if any(token_id >= VOCAB_SIZE for token_id in ids):
            raise errors.InvalidArgument(f"token ids must be below {VOCAB_SIZE}", field=field)

    def _prompt_info(self, request: pb.GenerateRequest, prompt: list[int]) -> pb.PromptInfo:
        info = pb.PromptInfo(token_ids=prompt, text=self._text(prompt))
        if request.sampling.HasField("prompt_logprobs"):
            info.logprobs.extend(
                self._logprob(token_id, position, request.sampling.prompt_logprobs)
                for position, token_id in enumerate(prompt)
            )
        return info

    def _continuation(
        self, request: pb.GenerateRequest, prompt: list[int], index: int
    ) -> list[pb.GenerateResponse]:
        """One message a token, the last with its end; a single message without a token for max_tokens 0."""
        sampling = request.sampling
        limit = sampling.max_tokens if sampling.HasField("max_tokens") else self.max_model_len - len(prompt)
        ids = [prompt[(index + step) % len(prompt)] for step in range(limit)]
        reason, stop = pb.FINISH_REASON_LENGTH, ""
        if self.eos_after is not None and self.eos_after < limit and not sampling.ignore_eos:
            ids, reason = [*ids[: self.eos_after], EOS], pb.FINISH_REASON_STOP
        pieces = self._pieces(ids)
        for candidate in sampling.stop:
            cut = "".join(pieces).find(candidate)
            if cut >= 0:
                num_tokens = next(k for k in range(len(pieces) + 1) if candidate in "".join(pieces[:k]))
                keep = cut + len(candidate) * sampling.include_stop_in_output
                ids, pieces = ids[:num_tokens], _cut(pieces[:num_tokens], keep)
                reason, stop = pb.FINISH_REASON_STOP, candidate
        messages = [
            pb.GenerateResponse(token_ids=[i], text=text) for i, text in zip(ids, pieces, strict=True)
        ]
        if sampling.HasField("logprobs"):
            for step, message in enumerate(messages):
                message.logprobs.append(self._logprob(ids[step], len(prompt) + step, sampling.logprobs))
        messages = messages or [pb.GenerateResponse()]
        messages[-1].finish_reason = reason
        messages[-1].stop = stop
        if request.return_weight_versions:
            messages[-1].weight_versions.add(version=self.epoch, start=0, end=len(ids))
        messages[-1].usage.CopyFrom(pb.Usage(prompt_tokens=len(prompt), completion_tokens=len(ids)))
        messages[-1].timing.CopyFrom(pb.Timing(queued_s=0.01, first_token_s=0.02, total_s=0.03))
        return messages

    def _text(self, ids: Iterable[int]) -> str:
        return decode(ids) if self.has_tokenizer else ""

    def _token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if self.has_tokenizer and token_id < EOS else b""

    def _pieces(self, ids: list[int]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if not self.has_tokenizer:
            return [""] * len(ids)
        return [decoder.decode(bytes([i]) if i < EOS else b"") for i in ids]

    def _logprob(self, token_id: int, position: int, num_top: int) -> pb.TokenLogprob:
        entry = pb.TokenLogprob(
            token_id=token_id, text=self._text([token_id]), token_bytes=self._token_bytes(token_id)
        )
        if position == 0:
            return entry
        entry.logprob = logprob_at(position)
        other = (token_id + 1) % EOS
        ranked = [(token_id, logprob_at(position)), (other, logprob_at(position) - 1)]
        if position % 2:
            ranked = [(other, logprob_at(position) / 2), ranked[0]]
        entry.top.extend(
            pb.Alternative(token_id=i, logprob=value, text=self._text([i]), token_bytes=self._token_bytes(i))
            for i, value in ranked[:num_top]
        )
        return entry


def logprob_at(position: int) -> float:
    """Exact in binary, so that tests may compare for equality."""
    return -(1 + position % 4) / 4


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    return bytes(token_id for token_id in ids if token_id < EOS).decode("utf-8", "replace")


def render(chat: pb.Chat) -> str:
    """The fake's chat template: every message in angle brackets."""
    return "".join(
        f"<{message.role}:{message.content or '+'.join(part.text for part in message.parts)}>"
        for message in chat.messages
    )


def _cut(pieces: list[str], num_chars: int) -> list[str]:
    kept = []
    for piece in pieces:
        kept.append(piece[:num_chars])
        num_chars = max(0, num_chars - len(piece))
    return kept


class RunningRouter:
    """A fake router on a port of loopback."""

    def __init__(self, router: FakeRouter, server: rpc.Server, address: str) -> None:
        self.router = router
        self.address = address
        self._server = server

    async def set_serving(self, serving: bool) -> None:
        await self._server.set_serving(serving)

    async def kill(self) -> None:
        """Ends at once, without a word to those who wait."""
        await self._server.stop(0)


@asynccontextmanager
async def running(router: FakeRouter, *, port: int = 0, serving: bool = True) -> AsyncIterator[RunningRouter]:
    server = rpc.Server(
        {rpc.INFERENCE_SERVICE: lambda it: add_InferenceServiceServicer_to_server(router, it)}
    )
    bound = await server.start("127.0.0.1", port)
    await server.set_serving(serving)
    try:
        yield RunningRouter(router, server, f"127.0.0.1:{bound}")
    finally:
        await server.stop(0)

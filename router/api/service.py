"""The public gRPC service of a router: validates, tokenizes, admits, streams and cancels.

Text is handled here, token ids in the engine. A call that is refused was never admitted. A call that ends
early (an error, a deadline, a client that went away) leaves nothing behind in the engine.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc

from moesaic import __version__, rpc
from moesaic.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable, Unsupported
from moesaic.expert_policy import ExpertPolicy
from moesaic.v1 import inference_pb2, inference_pb2_grpc
from router.api.continuation import prompt_message
from router.api.continuations import make_continuations
from router.api.event_bridge import EventBridge
from router.api.generate_call import GenerateCall, SequenceEngine
from router.api.prompt import read_prompt
from router.api.sampling_defaults import neutral_sampling
from router.api.sampling_request import ModelLimits
from router.api.tokens import detokenize, tokenize
from router.engine.request import Failed, Finished, PromptScored, Started, TokenGenerated
from router.engine.sampling_params import TokenLogprobs
from router.gating.model_view import ModelView
from router.text.text import Text

MAX_TENANT_CHARS = 256
MAX_SESSION_ID_CHARS = 256
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Larger messages are worked on in another thread, so that they do not delay other streams.
_LARGE_BYTES = 16 << 10
_LARGE_NUM_LOGPROBS = 256
# The most of them at once, so that they leave the engine its cores.
_LARGE_AT_ONCE = 2

_Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the router reports about its model. `created` is when it became ready, in seconds since 1970.
    `encodes_prompts`: whether an encoder reads the prompts and a decoder answers with a text of its own."""

    model: str
    family: str
    max_model_len: int
    vocab_size: int
    num_layers: int
    num_experts: int
    top_k: int
    created: int
    encodes_prompts: bool = False
    sampling_defaults: inference_pb2.SamplingParams = field(default_factory=neutral_sampling)


class ChooseView(Protocol):
    """Chooses what computes a request."""

    def __call__(
        self, request_id: str, session_id: str, epoch: str, policy: ExpertPolicy | None
    ) -> ModelView:
        """Raises InvalidArgument or FailedPrecondition for experts or an epoch that cannot be had, Unavailable."""
        ...


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """moesaic.v1.InferenceService for one model. It raises MoesaicErrors, which moesaic.rpc turns into
    statuses. To be created on the event loop that serves it."""

    def __init__(
        self,
        engine: SequenceEngine,
        text: Text,
        facts: ModelFacts,
        *,
        stats: Callable[[], inference_pb2.GetRouterStatsResponse],
        epoch: Callable[[], str],
        choose_view: ChooseView,
        control_address: Callable[[], str],
        request_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._text = text
        self._facts = facts
        self._limits = ModelLimits(
            facts.max_model_len,
            facts.vocab_size,
            text.eos_token_ids,
            facts.encodes_prompts,
            facts.sampling_defaults,
        )
        self._stats = stats
        self._epoch = epoch
        self._choose_view = choose_view
        self._control_address = control_address
        self._request_timeout_s = request_timeout_s
        self._bridge = EventBridge()
        self._draining = False
        self._large_texts = asyncio.Semaphore(_LARGE_AT_ONCE)

    def drain(self) -> None:
        """Refuses new requests from now on. Running ones continue."""
        self._draining = True

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self._check_open(request.model)
        call = await self._call(request, context)
        context.add_done_callback(lambda _: call.end())  # type: ignore[arg-type]
        unread = asyncio.create_task(_end_unread(context, asyncio.current_task(), call))
        try:
            call.admit()
            async for response in self._responses(call):
                yield response
        finally:
            call.end()
            unread.cancel()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        self._check_open(request.model)
        return await self._worked(
            request.ByteSize(), lambda: tokenize(request, self._text, self._facts.max_model_len)
        )

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: _Context
    ) -> inference_pb2.DetokenizeResponse:
        self._check_open(request.model)
        if not self._text.has_tokenizer:
            raise Unsupported("tokens: this model has no tokenizer", field="tokens")
        return await self._worked(
            request.ByteSize(), lambda: detokenize(request, self._text, self._limits.vocab_size)
        )

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        facts = self._facts
        return inference_pb2.GetModelInfoResponse(
            model=facts.model,
            version=__version__,
            family=facts.family,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            num_layers=facts.num_layers,
            num_experts=facts.num_experts,
            num_experts_per_token=facts.top_k,
            epoch=self._epoch(),
            has_tokenizer=self._text.has_tokenizer,
            has_chat_template=self._text.has_chat_template and not facts.encodes_prompts,
            eos_token_ids=sorted(self._text.eos_token_ids),
            created=facts.created,
            control_address=self._control_address(),
            encodes_prompts=facts.encodes_prompts,
            sampling_defaults=facts.sampling_defaults,
        )

    async def GetRouterStats(
        self, request: inference_pb2.GetRouterStatsRequest, context: _Context
    ) -> inference_pb2.GetRouterStatsResponse:
        return self._stats()

    async def _worked(self, num_bytes: int, work: Callable[[], _Result]) -> _Result:
        """The result of work on text, done beside the event loop where there is much of it."""
        if num_bytes <= _LARGE_BYTES:
            return work()
        async with self._large_texts:
            return await asyncio.to_thread(work)

    def _check_open(self, model: str) -> None:
        if self._draining:
            raise Unavailable("the router is draining", reason="DRAINING", retry_after_s=1.0)
        if model not in ("", self._facts.model):
            raise NotFound("model: no such model", field="model", reason="MODEL_NOT_FOUND")

    async def _call(self, request: inference_pb2.GenerateRequest, context: _Context) -> GenerateCall:
        """Checks everything that can be refused before a sequence is admitted."""
        request_id = _request_id(request, context)
        deadline_s = _deadline_s(context, self._request_timeout_s)
        _check_length("tenant", request.tenant, MAX_TENANT_CHARS)
        _check_length("session_id", request.session_id, MAX_SESSION_ID_CHARS)
        policy = ExpertPolicy.from_pb(request.experts) or None
        prompt = await self._worked(
            request.ByteSize(), lambda: read_prompt(request, self._text, self._limits)
        )
        continuations = await self._worked(
            request.resume.ByteSize(),
            lambda: make_continuations(
                request,
                prompt,
                self._text,
                self._limits,
                request_id=request_id,
                model=self._facts.model,
            ),
        )
        return GenerateCall(
            self._engine,
            request_id,
            prompt,
            continuations,
            deadline_s,
            tenant=request.tenant,
            policy=policy,
            resumes=request.HasField("resume"),
            choose_view=lambda: self._choose_view(request_id, request.session_id, request.epoch, policy),
            bridge=self._bridge,
        )

    async def _responses(self, call: GenerateCall) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for ending in call.endings:
            yield ending
        if not call.scores_prompt and not call.resumes:
            yield await self._prompt_response(call, None)
        while call.is_open:
            continuation, event = await call.next_event()
            match event:
                case Started():
                    continuation.on_started(event)
                case PromptScored(logprobs):
                    yield await self._prompt_response(call, logprobs)
                case TokenGenerated():
                    response = continuation.on_token(event)
                    if event.finished is not None:
                        call.forget(continuation)
                    elif continuation.finished:  # by a stop string, which the engine does not know
                        call.release(continuation)
                    yield response
                case Finished():
                    call.forget(continuation)
                    yield continuation.on_finished(event)
                case Failed(error):
                    raise error

    async def _prompt_response(
        self, call: GenerateCall, scores: tuple[TokenLogprobs, ...] | None
    ) -> inference_pb2.GenerateResponse:
        prompt = call.prompt
        info = await _off_loop(
            scores is not None and len(scores) > _LARGE_NUM_LOGPROBS,
            lambda: prompt_message(prompt.token_ids, prompt.text, self._text, scores),
        )
        policy = None if call.policy is None else call.policy.to_pb()
        first = call.continuations[0]
        return first.message(prompt=info, experts=policy, seed=first.params.seed)


async def _off_loop(is_large: bool, work: Callable[[], _Result]) -> _Result:
    return await asyncio.to_thread(work) if is_large else work()


async def _end_unread(context: _Context, handler: asyncio.Task[Any] | None, call: GenerateCall) -> None:
    """Ends a call whose client stopped reading. Its handler hangs in a write, beyond our deadlines."""
    reason = await call.unread()
    assert handler is not None
    # First, because a write that fails leaves the handler's generator as it stands, and gRPC may wait for ever for a
    # client that does not even read the status.
    call.end()
    try:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, reason)
    except grpc.aio.AbortError:
        handler.cancel()


def _request_id(request: inference_pb2.GenerateRequest, context: _Context) -> str:
    request_id = request.request_id or rpc.request_id(context) or uuid.uuid4().hex
    if not REQUEST_ID_PATTERN.fullmatch(request_id):
        raise InvalidArgument(
            "request_id: must be 1 to 128 letters, digits, dots, underscores or hyphens", field="request_id"
        )
    return request_id


def _check_length(field: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars:
        raise InvalidArgument(f"{field}: must be at most {max_chars} characters", field=field)


def _deadline_s(context: _Context, default_timeout_s: float) -> float:
    """The caller's deadline on the monotonic clock. Raises DeadlineExceeded when it has passed."""
    remaining_s: float | None = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineExceeded("deadline passed before the start")
    return time.monotonic() + (default_timeout_s if remaining_s is None else remaining_s)

"""The client library: text or token ids in, a stream of tokens out, over gRPC.

`Client` is asyncio; `SyncClient` is the same client on an event loop of its own. Every call has a deadline, carries the
current trace, and fails with a class of moesaic.errors. Needs neither torch nor ray nor pydantic.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Protocol, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.struct_pb2 import Struct

from moesaic import rpc, telemetry
from moesaic.completion import Completion, Token
from moesaic.errors import Cancelled, FailedPrecondition, InvalidArgument, from_rpc_error
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import InferenceServiceStub

GENERATE_TIMEOUT_S = 600.0
UNARY_TIMEOUT_S = 30.0

ChatMessage = Mapping[str, str]
# Text, token ids, or a conversation: messages with `role`, `content` and perhaps `name`.
Prompt = str | Sequence[int] | Sequence[ChatMessage]

_R = TypeVar("_R")


class GenerateOptions(TypedDict, total=False):
    """What `generate` and `complete` take by keyword; None is the same as absent: the router's default.

    Meanings, bounds and defaults are those of `SamplingParams` and `GenerateRequest` in inference.proto.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    include_stop_in_output: bool | None
    # For a text prompt.
    add_special_tokens: bool | None
    # Where an encoder reads the prompt: tokens that the answer begins with, such as the target language.
    decoder_prompt: Sequence[int] | None
    # For a conversation.
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    template_kwargs: Mapping[str, Any] | None
    # Empty or absent: the model that the router serves.
    model: str | None
    # Who asks: tenants share the router fairly and never each other's cached prefixes.
    tenant: str | None


_PROMPT_OPTIONS = frozenset(
    {
        "add_special_tokens",
        "decoder_prompt",
        "add_generation_prompt",
        "continue_final_message",
        "template_kwargs",
        "model",
        "tenant",
    }
)


class Client:
    """A client of one router.

    ```
    async with Client("127.0.0.1:50051") as client:
        async for token in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            print(token, end="", flush=True)
    ```
    Connects at the first call. Leaving the loop early, or cancelling the task, cancels the call on the router.
    """

    def __init__(self, target: str, *, timeout_s: float = GENERATE_TIMEOUT_S) -> None:
        """`target`: HOST:PORT of a router. `timeout_s`: the deadline of a generation that names none."""
        self._target = target
        self._timeout_s = timeout_s
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def cannot_connect(self) -> bool:
        """Whether no router could be reached at the last attempt to connect."""
        state = None if self._channel is None else self._channel.get_state()
        return state is grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def close(self) -> None:
        """Closes the connection; calls that still run fail with Cancelled. May be called twice."""
        self._closed = True
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Token, None]:
        """Streams `n` continuations of `prompt`, interleaved; `Token.index` tells them apart.

        `request_id` ([A-Za-z0-9._-], at most 128) is drawn by the router when absent. Raises MoesaicError.
        """
        request = _generate_request(prompt, n, request_id, options)
        call = self._stub().Generate(
            request,
            timeout=self._timeout_s if timeout_s is None else timeout_s,
            metadata=_metadata(request.request_id),
        )
        try:
            async for response in call:
                yield Token.from_pb(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            _raise_if_only_the_call_was_cancelled()
            raise
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer at once: one continuation of `prompt`. Raises MoesaicError."""
        tokens = self.generate(prompt, timeout_s=timeout_s, request_id=request_id, **options)
        return Completion.of([token async for token in tokens])

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> pb.TokenizeResponse:
        """Token ids of a text or of a conversation, with the vocabulary's spelling of each."""
        request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(_chat(prompt, {}))
        return await self._unary(self._stub().Tokenize(request, timeout=timeout_s, metadata=_metadata()))

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float = UNARY_TIMEOUT_S) -> str:
        """The text of some token ids."""
        request = pb.DetokenizeRequest()
        _assign(request.token_ids, token_ids, field="token_ids")
        response: pb.DetokenizeResponse = await self._unary(
            self._stub().Detokenize(request, timeout=timeout_s, metadata=_metadata())
        )
        return response.text

    async def model_info(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetModelInfoResponse:
        """What the router serves."""
        call = self._stub().GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout_s, metadata=_metadata())
        return await self._unary(call)

    async def router_stats(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetRouterStatsResponse:
        """Counters since the start of the router, and where its steps' time went."""
        call = self._stub().GetRouterStats(
            pb.GetRouterStatsRequest(), timeout=timeout_s, metadata=_metadata()
        )
        return await self._unary(call)

    def _stub(self) -> InferenceServiceStub:
        """Channels belong to an event loop: made inside it, and anew when the client is used in another one."""
        if self._closed:
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        loop = asyncio.get_running_loop()
        if self._channel is None or self._loop is not loop:
            self._channel, self._loop = rpc.aio_channel(self._target), loop
        return InferenceServiceStub(self._channel)

    async def _unary(self, call: Awaitable[_R]) -> _R:
        try:
            return await call
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            _raise_if_only_the_call_was_cancelled()
            raise


class SyncClient:
    """`Client` for code without asyncio: the same methods, blocking, on an event loop in a thread of its own."""

    def __init__(self, target: str, *, timeout_s: float = GENERATE_TIMEOUT_S) -> None:
        self._client = Client(target, timeout_s=timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="moesaic-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and ends the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        self._loop.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Token, None, None]:
        tokens = self._client.generate(prompt, n=n, timeout_s=timeout_s, request_id=request_id, **options)
        try:
            while (token := self._run(_next(tokens))) is not None:
                yield token
        finally:
            self._run(tokens.aclose())

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        return self._run(self._client.complete(prompt, timeout_s=timeout_s, request_id=request_id, **options))

    def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> pb.TokenizeResponse:
        return self._run(
            self._client.tokenize(prompt, add_special_tokens=add_special_tokens, timeout_s=timeout_s)
        )

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float = UNARY_TIMEOUT_S) -> str:
        return self._run(self._client.detokenize(token_ids, timeout_s=timeout_s))

    def model_info(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetModelInfoResponse:
        return self._run(self._client.model_info(timeout_s=timeout_s))

    def router_stats(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetRouterStatsResponse:
        return self._run(self._client.router_stats(timeout_s=timeout_s))

    def _run(self, coroutine: Coroutine[Any, Any, _R]) -> _R:
        """Blocks until the coroutine is done; the call's own deadline bounds the wait."""
        if self._loop.is_closed():
            coroutine.close()
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _next(tokens: AsyncGenerator[Token, None]) -> Token | None:
    return await anext(tokens, None)


def _raise_if_only_the_call_was_cancelled() -> None:
    """grpc raises CancelledError too when its channel closes; only the task's own cancellation is one of asyncio's."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise Cancelled("the client was closed during the call")


def _metadata(request_id: str = "") -> list[tuple[str, str]]:
    metadata = telemetry.inject()
    if request_id:
        metadata.append((telemetry.REQUEST_ID_METADATA, request_id))
    return metadata


def _generate_request(
    prompt: Prompt, n: int, request_id: str | None, options: GenerateOptions
) -> pb.GenerateRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    given = {name: value for name, value in options.items() if value is not None}
    request = pb.GenerateRequest(request_id=request_id or "", sampling=_sampling(given))
    _set(
        request,
        n=n,
        model=given.get("model", ""),
        add_special_tokens=given.get("add_special_tokens"),
        tenant=given.get("tenant", ""),
    )
    _assign(request.decoder_prompt, options.get("decoder_prompt") or (), field="decoder_prompt")
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(_chat(prompt, given))
    else:
        request.token_ids.SetInParent()
        _assign(request.token_ids.ids, prompt, field="prompt")
    return request


def _sampling(given: Mapping[str, Any]) -> pb.SamplingParams:
    sampling = pb.SamplingParams()
    for name, value in given.items():
        if name not in _PROMPT_OPTIONS:
            _set(sampling, **{name: [value] if name == "stop" and isinstance(value, str) else value})
    return sampling


def _chat(messages: Sequence[Any], given: Mapping[str, Any]) -> pb.Chat:
    chat = pb.Chat()
    try:
        chat.messages.extend(pb.ChatMessage(**message) for message in messages)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            "messages must have a role and a content, both strings, and at most a name beside them",
            field="prompt",
        ) from error
    _set(
        chat,
        add_generation_prompt=given.get("add_generation_prompt"),
        continue_final_message=given.get("continue_final_message"),
    )
    if "template_kwargs" in given:
        chat.template_kwargs.CopyFrom(_struct(given["template_kwargs"]))
    return chat


def _struct(values: Mapping[str, Any]) -> Struct:
    struct = Struct()
    try:
        struct.update(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument("template_kwargs must hold JSON values", field="template_kwargs") from error
    return struct


class _Message(Protocol):
    """Any protobuf message, made from keywords and merged."""

    def MergeFrom(self, msg: Any, /) -> None: ...


def _set(message: _Message, **fields: Any) -> None:
    """Sets fields one by one, so that the error names the one that does not fit its wire type."""
    for name, value in fields.items():
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{name} has the wrong type or is out of range", field=name) from error


def _assign(ids: Any, values: Sequence[Any], *, field: str) -> None:
    try:
        ids.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{field} must be text, messages, or token ids of at least 0", field=field
        ) from error

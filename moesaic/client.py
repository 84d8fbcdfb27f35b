"""The client library: text or token ids in, a stream of tokens out, over gRPC.

`Client` is for asyncio; `SyncClient` runs the same client on an event loop of its own. Every call has a
deadline, carries the current trace, and fails with a class of moesaic.errors. Neither torch nor ray nor
pydantic is imported.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc

from moesaic import rpc, telemetry
from moesaic.completion import Completion, Token
from moesaic.errors import Cancelled, FailedPrecondition, from_rpc_error
from moesaic.generate_request import (
    ChatMessage,
    GenerateOptions,
    Prompt,
    assign_ids,
    chat_from,
    generate_request,
)
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import InferenceServiceStub

GENERATE_TIMEOUT_S = 600.0
UNARY_TIMEOUT_S = 30.0

_R = TypeVar("_R")


class Client:
    """A client of one router.

    ```
    async with Client("127.0.0.1:50051") as client:
        async for token in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            print(token, end="", flush=True)
    ```

    The client connects at the first call. Leaving the loop early, or cancelling the task, cancels the call on
    the router.
    """

    def __init__(self, target: str, *, timeout_s: float = GENERATE_TIMEOUT_S) -> None:
        """`target`: HOST:PORT of a router. `timeout_s`: the default deadline of a generation."""
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
        return self._channel is not None and rpc.cannot_connect(self._channel)

    async def close(self) -> None:
        """Closes the connection. Calls that still run fail with Cancelled. May be called twice."""
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
        """Streams `n` continuations of `prompt`, interleaved; `Token.index` numbers them.

        `request_id` ([A-Za-z0-9._-], at most 128) is drawn by the router when absent. Raises MoesaicError.
        """
        request = generate_request(prompt, n, request_id, options)
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
        """One continuation of `prompt` as a whole. Raises MoesaicError."""
        tokens = self.generate(prompt, timeout_s=timeout_s, request_id=request_id, **options)
        return Completion.of([token async for token in tokens])

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> pb.TokenizeResponse:
        """The token ids of a text or conversation, with the vocabulary's spelling of each."""
        request = pb.TokenizeRequest(add_special_tokens=add_special_tokens, return_tokens=True)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat_from(prompt))
        return await self._unary(self._stub().Tokenize(request, timeout=timeout_s, metadata=_metadata()))

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float = UNARY_TIMEOUT_S) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest()
        assign_ids(request.token_ids, token_ids, field="token_ids")
        response: pb.DetokenizeResponse = await self._unary(
            self._stub().Detokenize(request, timeout=timeout_s, metadata=_metadata())
        )
        return response.text

    async def model_info(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetModelInfoResponse:
        """The model that the router serves."""
        call = self._stub().GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout_s, metadata=_metadata())
        return await self._unary(call)

    async def router_stats(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> pb.GetRouterStatsResponse:
        """The router's counters since its start, and the time that its steps spent in each phase."""
        call = self._stub().GetRouterStats(
            pb.GetRouterStatsRequest(), timeout=timeout_s, metadata=_metadata()
        )
        return await self._unary(call)

    def _stub(self) -> InferenceServiceStub:
        """A stub on a channel of this event loop.

        A client that is used in another loop gets a new channel.
        """
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
    """`Client` for code without asyncio: blocking, on an event loop in a thread of its own."""

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
        """Blocks until the coroutine is done. The call's own deadline bounds the wait."""
        if self._loop.is_closed():
            coroutine.close()
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _next(tokens: AsyncGenerator[Token, None]) -> Token | None:
    return await anext(tokens, None)


def _raise_if_only_the_call_was_cancelled() -> None:
    """Raises Cancelled unless the current task was cancelled.

    gRPC raises CancelledError, too, when its channel is closed.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise Cancelled("the client was closed during the call")


def _metadata(request_id: str = "") -> list[tuple[str, str]]:
    metadata = telemetry.inject()
    if request_id:
        metadata.append((telemetry.REQUEST_ID_METADATA, request_id))
    return metadata

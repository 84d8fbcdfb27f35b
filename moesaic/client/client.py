"""The client library for asyncio: text or token ids in, a stream of tokens out, over gRPC.

Every call has a deadline, carries the current trace, is tried again where the router says that waiting helps,
goes on at another router when its own dies, and fails with a class of moesaic.errors. Neither torch nor ray nor pydantic is imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Self, Unpack

import grpc

from moesaic import rpc, telemetry
from moesaic.client.attempts import Attempts
from moesaic.client.call_failure import explain
from moesaic.client.completion import Completion, Token, TokenReader
from moesaic.client.generate_request import (
    ChatMessage,
    GenerateOptions,
    Prompt,
    TokenIds,
    detokenize_request,
    generate_request,
    refuse_n,
    shows_options,
    tokenize_request,
)
from moesaic.client.model_info import ModelInfo
from moesaic.client.received_answer import ReceivedAnswer
from moesaic.client.router_stats import RouterStats
from moesaic.client.target import Targets
from moesaic.client.tokenization import Tokenization
from moesaic.errors import Cancelled, FailedPrecondition
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import InferenceServiceStub

GENERATE_TIMEOUT_S = 600.0
UNARY_TIMEOUT_S = 30.0


class Client:
    """A client of one router or of several that serve the same model, for asyncio.

    ```
    async with Client("127.0.0.1:50051") as client:
        async for token in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            print(token, end="", flush=True)
    ```

    The client connects at the first call. Leaving the loop early, or cancelling the task, cancels the call on
    the router.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        retries: bool = True,
    ) -> None:
        """A client of the router at `target`, which is HOST:PORT; "HOST:PORT,HOST:PORT" or a sequence for several.

        Raises InvalidArgument for anything else. `timeout_s` is the default deadline of a generation. With `retries`, a
        call that the router refuses for the moment (it is starting, full, or has lost an expert worker) is
        repeated within its deadline after the time that the router asks for, before a token has arrived. An
        answer whose router dies or stops goes on at the next router, or at the same one when it is back: the text is
        that of an undisturbed answer.
        """
        self._targets = Targets(target)
        self._timeout_s = timeout_s
        self._retries = retries
        # By address.
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Calls that still run fail with Cancelled. May be called twice."""
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    @shows_options
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

        `prompt` is text, a sequence or array of token ids, or a list of messages with `role` and `content`.
        `request_id` ([A-Za-z0-9._-], at most 128) is drawn by the router when absent. Raises MoesaicError.
        """
        answer = ReceivedAnswer(generate_request(prompt, n, request_id, options))
        attempts = self._attempts(self._timeout_s if timeout_s is None else timeout_s)
        metadata = call_metadata(request_id or "")
        tokens = TokenReader()
        while not answer.complete:
            target = self._targets.present
            call = self._stub(target).Generate(
                answer.next_request(), timeout=attempts.time_left_s, metadata=metadata
            )
            try:
                async for response in call:
                    answer.take(rpc.received(response))
                    attempts.note_answer()
                    token = tokens.read(response)
                    if token is not None:
                        yield token
                return
            except grpc.RpcError as error:
                failure = explain(error, target, timeout_s=attempts.timeout_s, begun=answer.begun)
                delay_s = attempts.delay_after(failure, begun=answer.begun)
                if delay_s is None:
                    raise failure from error
            except asyncio.CancelledError:
                _raise_if_only_the_call_was_cancelled()
                raise
            finally:
                call.cancel()
            self._targets.leave(target)
            await asyncio.sleep(delay_s)

    @shows_options
    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """One continuation of `prompt` as a whole. Raises MoesaicError.

        Several continuations of one prompt come from `generate(prompt, n=…)`.
        """
        refuse_n(options)
        tokens = self.generate(prompt, timeout_s=timeout_s, request_id=request_id, **options)
        return Completion.of([token async for token in tokens])

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool | None = None,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> Tokenization:
        """The token ids of a text or conversation, with the vocabulary's spelling of each."""
        request = tokenize_request(prompt, add_special_tokens)
        return Tokenization.from_pb(await self._unary(lambda stub: stub.Tokenize, request, timeout_s))

    async def detokenize(self, token_ids: TokenIds, *, timeout_s: float = UNARY_TIMEOUT_S) -> str:
        """The text of token ids."""
        request = detokenize_request(token_ids)
        response: pb.DetokenizeResponse = await self._unary(lambda stub: stub.Detokenize, request, timeout_s)
        return response.text

    async def model_info(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> ModelInfo:
        """The model that the router serves."""
        request = pb.GetModelInfoRequest()
        return ModelInfo.from_pb(await self._unary(lambda stub: stub.GetModelInfo, request, timeout_s))

    async def router_stats(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> RouterStats:
        """The router's counters since its start, and the time that its steps spent in each phase."""
        request = pb.GetRouterStatsRequest()
        return RouterStats.from_pb(await self._unary(lambda stub: stub.GetRouterStats, request, timeout_s))

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(timeout_s, retries=self._retries, num_routers=len(self._targets.addresses))

    def _stub(self, target: str) -> InferenceServiceStub:
        """A stub on a channel of this event loop.

        A client that is used in another loop gets new channels.
        """
        if self._closed:
            raise client_closed()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._channels, self._loop = {}, loop
        if target not in self._channels:
            self._channels[target] = rpc.aio_channel(target, watchful=True)
        return InferenceServiceStub(self._channels[target])

    async def _unary(
        self, method: Callable[[InferenceServiceStub], Any], request: object, timeout_s: float
    ) -> Any:
        attempts = self._attempts(timeout_s)
        while True:
            target = self._targets.present
            try:
                call = method(self._stub(target))
                return rpc.received(
                    await call(request, timeout=attempts.time_left_s, metadata=call_metadata())
                )
            except grpc.RpcError as error:
                failure = explain(error, target, timeout_s=timeout_s)
                delay_s = attempts.delay_after(failure)
                if delay_s is None:
                    raise failure from error
            except asyncio.CancelledError:
                _raise_if_only_the_call_was_cancelled()
                raise
            self._targets.leave(target)
            await asyncio.sleep(delay_s)


def client_closed() -> FailedPrecondition:
    return FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")


def call_metadata(request_id: str = "") -> list[tuple[str, str]]:
    """The trace of the caller, and the id of its request where it has one."""
    metadata = telemetry.inject()
    if request_id:
        metadata.append((telemetry.REQUEST_ID_METADATA, request_id))
    return metadata


def _raise_if_only_the_call_was_cancelled() -> None:
    """Raises Cancelled unless the current task was cancelled.

    gRPC raises CancelledError, too, when its channel is closed.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise Cancelled("the client was closed during the call")

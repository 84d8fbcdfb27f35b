"""What operators ask of a controller: bundles are uploaded and forgotten, changes made, and the history read."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.observation.reachability import hinting_at_serve
from moesaic import rpc
from moesaic.bundles import Bundle
from moesaic.client.call_failure import explain
from moesaic.errors import Aborted, FailedPrecondition, Unavailable, from_rpc_error
from moesaic.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

# Whoever does not say within this time that it is there counts as away.
REACH_TIMEOUT_S = 2.0
ASK_TIMEOUT_S = 10.0
# Of an upload and of a change: weights may be many gigabytes, and a drain takes as long as answers do.
CHANGE_TIMEOUT_S = 3600.0
_PIECE_BYTES = 1 << 20

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A change that every router has: the epoch that it made, and the one that it left.

    `committed_s`, `spread_s`: seconds from the command until it was committed, and until every router had it.
    """

    epoch: str
    previous_epoch: str
    committed_s: float
    spread_s: float


class ControllerClient:
    """Asks the controller behind a channel. Every method raises the MoesaicError that it answers with."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(channel)
        self._address = address

    async def upload(
        self, bundle: Bundle, show: Callable[[int, int], None] = lambda done, total: None
    ) -> control_pb2.UploadBundleResponse:
        """Sends the bundle unless it is stored there already. `show`: the bytes that were sent, and all."""
        for stored in await self.bundles():
            if stored.digest == bundle.digest:
                return control_pb2.UploadBundleResponse(name=stored.name, digest=stored.digest, known=True)
        return await self._answer(self._stub.UploadBundle(_parts(bundle, show), timeout=CHANGE_TIMEOUT_S))

    async def change(
        self, request: control_pb2.ChangeRequest
    ) -> AsyncGenerator[control_pb2.ChangeResponse, None]:
        """The steps of a change, as they are done. Closing the generator ends the call, and the change goes on."""
        with _as_errors(self._address):
            call = self._stub.Change(request, timeout=CHANGE_TIMEOUT_S)
            try:
                async for response in call:
                    yield rpc.received(response)
            finally:
                call.cancel()

    async def carry_out(
        self,
        request: control_pb2.ChangeRequest,
        show: Callable[[control_pb2.ChangeResponse], None] = lambda step: None,
    ) -> CarriedOut:
        """Makes a change, and returns once every router has it; what was before may still be given up.

        `show`: every step on the way. Raises Aborted, too, where the controller ends it before that.
        """
        start_s, committed_s = time.perf_counter(), 0.0
        async with aclosing(self.change(request)) as steps:
            async for step in steps:
                show(step)
                if step.epoch and not committed_s:
                    committed_s = time.perf_counter() - start_s
                if step.stage == control_pb2.CHANGE_STAGE_SPREAD and step.done == step.total > 0:
                    spread_s = time.perf_counter() - start_s
                    return CarriedOut(step.epoch, step.previous_epoch, committed_s, spread_s)
        raise Aborted("the controller ended the change before every router had it")

    async def bundles(self) -> list[control_pb2.StoredBundle]:
        request = control_pb2.ListBundlesRequest()
        answer = await self._answer(self._stub.ListBundles(request, timeout=ASK_TIMEOUT_S))
        return list(answer.bundles)

    async def forget(self, digest: bytes, operator: str) -> control_pb2.ForgetBundleResponse:
        """Deletes a stored bundle."""
        request = control_pb2.ForgetBundleRequest(digest=digest, operator=operator)
        return await self._answer(self._stub.ForgetBundle(request, timeout=ASK_TIMEOUT_S))

    async def history(self, limit: int) -> control_pb2.GetHistoryResponse:
        """The newest entries, at most so many."""
        request = control_pb2.GetHistoryRequest(limit=limit)
        return await self._answer(self._stub.GetHistory(request, timeout=ASK_TIMEOUT_S))

    async def _answer(self, call: Awaitable[_R]) -> _R:
        with _as_errors(self._address):
            return rpc.received(await call)


@asynccontextmanager
async def controller_client(address: str) -> AsyncIterator[ControllerClient]:
    """A client of the controller at HOST:PORT. Raises Unavailable at once, or soon, where none answers."""
    async with rpc.aio_channel(address, max_message_bytes=rpc.DATA_MESSAGE_BYTES) as channel:
        await _reach(channel, address)
        yield ControllerClient(channel, address)


async def find_controller(router: str) -> str:
    """The address of the controller that the router at HOST:PORT follows. Raises FailedPrecondition if it has none."""
    async with rpc.aio_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GetModelInfoRequest()
        with hinting_at_serve():
            try:
                model = rpc.received(await stub.GetModelInfo(request, timeout=ASK_TIMEOUT_S))
            except grpc.aio.AioRpcError as error:
                raise explain(error, router, timeout_s=ASK_TIMEOUT_S) from error
    address: str = model.control_address
    if not address:
        raise FailedPrecondition(
            f"the router at {router} follows no controller, as its workers were named by hand: "
            "only a controller changes experts",
            reason="NO_CONTROLLER",
        )
    return address


async def _reach(channel: grpc.aio.Channel, address: str) -> None:
    """Asks for a sign of life before a call that may take an hour. What the sign says does not matter."""
    try:
        await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=REACH_TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise _away(address) from error


def _away(address: str) -> Unavailable:
    return Unavailable(
        f"no controller answers at {address}: serving goes on, and changes wait until it is back",
        reason="NO_CONTROLLER",
    )


@contextmanager
def _as_errors(address: str) -> Iterator[None]:
    """Raises the controller's own error, or Unavailable that names the address where none listens."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAVAILABLE and rpc_status.from_call(error) is None:
            raise _away(address) from error
        raise from_rpc_error(error) from error


async def _parts(
    bundle: Bundle, show: Callable[[int, int], None]
) -> AsyncIterator[control_pb2.UploadBundleRequest]:
    yield control_pb2.UploadBundleRequest(manifest=bundle.manifest_bytes)
    if bundle.signature_bytes is not None:
        yield control_pb2.UploadBundleRequest(signature=bundle.signature_bytes)
    sent, total = 0, bundle.num_bytes
    with bundle.weights_file.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield control_pb2.UploadBundleRequest(weights=piece)
            sent += len(piece)
            show(sent, total)

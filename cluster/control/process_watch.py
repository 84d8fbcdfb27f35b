"""How the controller observes processes: by their reports, and by the health streams of the workers.

A process is asked for its report, and answers when something changes. By this alone a death is noticed after
a second or two; the health stream of a worker's gRPC server breaks within milliseconds. Whichever comes first
counts. A stream may also break because the controller was cut off or asleep, so that it is evidence of a death
only where nothing listens at the worker's address any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.control.process_report import EVIDENCE, NOT_SERVING, PROCESS_DIED, ProcessReport
from cluster.control.worker_facts import WorkerFacts
from moesaic import rpc
from moesaic.errors import MoesaicError, Unavailable
from moesaic.v1 import expert_pb2, expert_pb2_grpc

if TYPE_CHECKING:
    from cluster.control.peers import Peers

# How long a process may hold a question. It is short while the process loads, because reports then show
# progress.
LOADING_HOLD_S = 0.25
READY_HOLD_S = 2.0
DESCRIBE_TIMEOUT_S = 5.0
# A process that ends may close its connections a moment before its port.
PROBES = 3
PROBE_PERIOD_S = 0.05
PROBE_TIMEOUT_S = 1.0


class ProcessWatch:
    """Asks peers for reports and keeps a health stream open to each worker that was described."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._last: dict[str, ProcessReport] = {}
        self._losses: dict[str, asyncio.Task[Unavailable]] = {}
        self._addresses: dict[str, str] = {}

    async def report(self, name: str, seen: int) -> ProcessReport:
        """See ProcessObserver."""
        last = self._last.pop(name, None)
        hold_s = READY_HOLD_S if last is not None and last.ready else LOADING_HOLD_S
        question = self._peers.report(name, seen, hold_s)
        try:
            report = await self._unless_lost(question, last.address if last else None)
        except MoesaicError as error:
            if last is not None:
                self._drop(last.address)
            address = self._addresses.get(name)
            if address and error.reason not in EVIDENCE and await _refuses(address):
                raise Unavailable(
                    f"nothing listens at its address any more ({error.message})", reason=PROCESS_DIED
                ) from error
            raise
        if last is not None and last.address != report.address:
            self._drop(last.address)
        self._last[name] = report
        self._addresses[name] = report.address
        return report

    async def describe(self, address: str) -> WorkerFacts:
        """See ProcessObserver. From now on the loss of the worker is noticed at once."""
        channel = rpc.aio_channel(address)
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                health, answer = await _ask(channel)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            await channel.close()
            raise Unavailable(f"{address} does not answer") from error
        except MoesaicError:
            await channel.close()
            raise
        self._drop(address)
        self._losses[address] = asyncio.create_task(_until_lost(channel, health))
        return WorkerFacts.from_description(address, answer)

    async def _unless_lost(
        self, question: Coroutine[Any, Any, ProcessReport], address: str | None
    ) -> ProcessReport:
        """The answer to the question. Raises Unavailable as soon as the process is known to be lost.

        Whoever describes the worker meanwhile puts a new health stream in the place of the old one, whose end then
        says nothing.
        """
        ask = asyncio.create_task(question)
        try:
            while not ask.done():
                loss = self._losses.get(address) if address else None
                await asyncio.wait({ask, loss} if loss else {ask}, return_when=asyncio.FIRST_COMPLETED)
                if loss is not None and loss.done() and not loss.cancelled():
                    raise loss.result()
            return ask.result()
        finally:
            ask.cancel()

    def _drop(self, address: str) -> None:
        if (task := self._losses.pop(address, None)) is not None:
            task.cancel()


async def _ask(channel: grpc.aio.Channel) -> tuple[AsyncIterator[Any], expert_pb2.DescribeResponse]:
    """The health stream of a worker that is SERVING, and its description."""
    question = health_pb2.HealthCheckRequest(service=rpc.EXPERT_SERVICE)
    health: AsyncIterator[Any] = aiter(health_pb2_grpc.HealthStub(channel).Watch(question))
    if not _serving(await anext(health, None)):
        raise Unavailable("it does not serve", reason=NOT_SERVING)
    stub = expert_pb2_grpc.ExpertServiceStub(channel)
    return health, rpc.received(await stub.Describe(expert_pb2.DescribeRequest()))


async def _until_lost(channel: grpc.aio.Channel, health: AsyncIterator[Any]) -> Unavailable:
    """Waits until the worker's health stream says that it does not serve, or ends; returns which."""
    async with channel:
        try:
            async for status in health:
                if not _serving(status):
                    return Unavailable("it does not serve", reason=NOT_SERVING)
        except grpc.aio.AioRpcError:
            return Unavailable("its connection broke")
    return Unavailable("it closed its connection")


async def _refuses(address: str) -> bool:
    """Whether the host at HOST:PORT answers that nothing listens there. A host that is silent refuses nothing."""
    host, _, port = address.rpartition(":")
    for probe in range(PROBES):
        if probe:
            await asyncio.sleep(PROBE_PERIOD_S)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
    return False


def _serving(status: Any) -> bool:
    return isinstance(status, health_pb2.HealthCheckResponse) and bool(
        status.status == health_pb2.HealthCheckResponse.SERVING
    )

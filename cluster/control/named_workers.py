"""Workers that a person started by hand, observed at their addresses, which are also their names."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import grpc

from cluster.control.process_report import NOT_SERVING, ProcessReport
from cluster.control.process_watch import ProcessWatch
from cluster.control.worker_facts import WorkerFacts
from moesaic import rpc
from moesaic.addresses import split_address
from moesaic.errors import Unavailable
from moesaic.v1 import control_pb2, expert_pb2, expert_pb2_grpc

POLL_S = 0.2
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a worker's report says, and how often that has changed."""

    revision: int
    incarnation: str
    contents_revision: int
    restarts: int


class NamedPeers:
    """Asks the workers themselves for what their hosts would report; there are no hosts."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        """See Peers. `name` is HOST:PORT."""
        deadline_s = asyncio.get_running_loop().time() + hold_s
        while True:
            report = await self._ask(name)
            if report.revision != seen or asyncio.get_running_loop().time() >= deadline_s:
                return report
            await asyncio.sleep(POLL_S)

    async def address(self, name: str) -> str:
        """See Peers."""
        return name

    async def _ask(self, name: str) -> ProcessReport:
        async with rpc.aio_channel(name) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            try:
                answer = await stub.Describe(expert_pb2.DescribeRequest(), timeout=ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise Unavailable("it does not serve yet", reason=NOT_SERVING) from error
                raise Unavailable("it does not answer") from error
        now = self._note(name, rpc.received(answer))
        return ProcessReport(
            name=name,
            revision=now.revision,
            state=control_pb2.PROCESS_STATE_READY,
            address=name,
            node=split_address(name)[0],
            pid=0,
            restarts=now.restarts,
            loaded_bytes=answer.weight_bytes,
            total_bytes=answer.weight_bytes,
            contents_revision=now.contents_revision,
        )

    def _note(self, name: str, answer: expert_pb2.DescribeResponse) -> _Seen:
        was = self._seen.get(name, _Seen(0, answer.incarnation, -1, 0))
        if (was.incarnation, was.contents_revision) != (answer.incarnation, answer.contents_revision):
            restarted = was.incarnation != answer.incarnation
            self._seen[name] = _Seen(
                was.revision + 1, answer.incarnation, answer.contents_revision, was.restarts + restarted
            )
        return self._seen[name]


class NamedWorkers:
    """A ProcessObserver of workers by address."""

    def __init__(self) -> None:
        self._watch = ProcessWatch(NamedPeers())

    async def report(self, name: str, seen: int) -> ProcessReport:
        return await self._watch.report(name, seen)

    async def describe(self, address: str) -> WorkerFacts:
        facts = await self._watch.describe(address)
        return replace(facts, replica=replace(facts.replica, worker=address))

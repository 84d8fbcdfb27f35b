"""How a router learns what the model is and where it runs: a stream of whole snapshots.

`ControlWatch` follows a controller; while the controller is away, the last snapshot stays in use.
`NamedWorkers` asks workers whose addresses a person gave.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Protocol

import grpc

from moesaic import rpc
from moesaic.epoch import Epoch, ExpertAddress, merge_versions
from moesaic.errors import FailedPrecondition, MoesaicError
from moesaic.routing_table import Replica, RoutingTable, Snapshot
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

log = logging.getLogger(__name__)

POLL_S = 0.5
CALL_TIMEOUT_S = 2.0


class ClusterView(Protocol):
    """A source of snapshots."""

    def watch(self) -> AsyncIterator[Snapshot]:
        """The present snapshot, then one for every change; ends only when it is cancelled."""
        ...

    @property
    def control_address(self) -> str:
        """HOST:PORT of the controller; empty without one."""
        ...


class ControlWatch:
    """Follows `ControlService.Watch`; resolves the controller's address again when the stream breaks."""

    def __init__(self, resolve: Callable[[], Awaitable[str]]) -> None:
        self._resolve = resolve
        self._address = ""

    @property
    def control_address(self) -> str:
        return self._address

    async def watch(self) -> AsyncIterator[Snapshot]:
        while True:
            try:
                self._address = await self._resolve()
                async for snapshot in self._follow(self._address):
                    yield snapshot
            except (MoesaicError, grpc.aio.AioRpcError) as error:
                log.warning("the controller is away", extra={"fields": {"error": type(error).__name__}})
            await asyncio.sleep(POLL_S)

    async def _follow(self, address: str) -> AsyncIterator[Snapshot]:
        async with rpc.aio_channel(address) as channel:
            stream = control_pb2_grpc.ControlServiceStub(channel).Watch(control_pb2.WatchRequest())
            async for message in stream:
                yield Snapshot.from_proto(rpc.received(message))


class NamedWorkers:
    """Polls the workers at fixed addresses for what they hold.

    `experts` are those of the model. A model without experts needs no workers.
    """

    def __init__(self, addresses: Sequence[str], *, model: str, experts: Collection[ExpertAddress]) -> None:
        self._addresses = tuple(addresses)
        self._model = model
        self._experts = frozenset(experts)

    @property
    def control_address(self) -> str:
        return ""

    async def watch(self) -> AsyncIterator[Snapshot]:
        channels = {address: rpc.aio_channel(address) for address in self._addresses}
        known: dict[str, Replica] | None = None
        revision = 0
        try:
            while True:
                last = known or {}
                answers = await asyncio.gather(
                    *(_describe(address, channels[address], last.get(address)) for address in channels)
                )
                now = {replica.address: replica for replica in answers if replica is not None}
                if now != known:
                    known, revision = now, revision + 1
                    replicas = tuple(now.values())
                    yield Snapshot(self._epoch(replicas), RoutingTable(revision, replicas))
                await asyncio.sleep(POLL_S)
        finally:
            for channel in channels.values():
                await channel.close()

    def _epoch(self, replicas: tuple[Replica, ...]) -> Epoch | None:
        try:
            versions = merge_versions((replica.holdings for replica in replicas), self._experts)
        except FailedPrecondition as error:
            log.info("the model is not complete yet", extra={"fields": {"reason": error.reason}})
            return None
        return Epoch.of(self._model, versions)


async def _describe(address: str, channel: grpc.aio.Channel, last: Replica | None) -> Replica | None:
    """The replica at an address; None while it loads, is gone, or describes itself in a way that cannot be. A slow worker
    counts as unchanged."""
    stub = expert_pb2_grpc.ExpertServiceStub(channel)
    try:
        answer = await stub.Describe(expert_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return last if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else None
    try:
        return Replica.from_description(address, rpc.received(answer))
    except MoesaicError as error:
        log.warning("worker refused", extra={"fields": {"worker": address, "reason": error.message}})
        return None

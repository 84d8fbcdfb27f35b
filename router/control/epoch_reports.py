"""Tells the controller which epochs this router holds and how their sequences do.

It does so after every change and every second. A controller that is away, or too old to know the call, is no error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from moesaic import rpc
from moesaic.v1 import control_pb2, control_pb2_grpc
from router.control.epochs import EpochBook
from router.engine.epoch_tally import EpochTally, quantile

log = logging.getLogger(__name__)

PERIOD_S = 1.0
CALL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    """Who reports: its name, the id of this start, and HOST:PORT of its public service."""

    name: str
    incarnation: str
    address: str


def report_of(
    identity: RouterIdentity,
    book: EpochBook,
    *,
    revision: int,
    open_sequences: Mapping[str, int],
    tallies: Mapping[str, EpochTally],
) -> control_pb2.ReportEpochsRequest:
    """`revision`: that of the routing table in use. The others are by epoch."""
    return control_pb2.ReportEpochsRequest(
        router=identity.name,
        incarnation=identity.incarnation,
        address=identity.address,
        epoch="" if book.current is None else book.current.id,
        canary="" if book.canary is None else book.canary.epoch.id,
        routing_table_revision=revision,
        epochs=[
            epoch_stats(epoch.id, open_sequences.get(epoch.id, 0), tallies.get(epoch.id) or EpochTally())
            for epoch in book.held
        ],
    )


def epoch_stats(epoch: str, open_sequences: int, tally: EpochTally) -> control_pb2.EpochStats:
    token_s = tally.token_s.copy()
    return control_pb2.EpochStats(
        epoch=epoch,
        open_sequences=open_sequences,
        finished=tally.finished,
        failed=tally.failed,
        not_finite=tally.not_finite,
        token_p50_s=quantile(token_s, 0.5),
        token_p99_s=quantile(token_s, 0.99),
        first_token_p50_s=quantile(tally.first_token_s.copy(), 0.5),
        shadow_rows=tally.shadow.rows,
        shadow_min_cosine=tally.shadow.min_cosine if tally.shadow.rows else 0.0,
        shadow_mean_cosine=tally.shadow.mean_cosine,
        shadow_max_difference=tally.shadow.max_difference,
    )


class EpochReporter:
    """Sends the reports, one after the other."""

    def __init__(
        self,
        control_address: Callable[[], str],
        report: Callable[[], control_pb2.ReportEpochsRequest],
        changed: asyncio.Event,
    ) -> None:
        """`control_address`: HOST:PORT of the controller that is followed now; empty without one."""
        self._control_address = control_address
        self._report = report
        self._changed = changed

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            address = self._control_address()
            if not address:
                await self._wait()
                continue
            async with rpc.aio_channel(address) as channel:
                stub = control_pb2_grpc.ControlServiceStub(channel)
                while self._control_address() == address:
                    await self._send(stub)
                    await self._wait()

    async def _send(self, stub: control_pb2_grpc.ControlServiceStub) -> None:
        try:
            await stub.ReportEpochs(self._report(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.debug("the controller took no report", extra={"fields": {"code": error.code().name}})

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(PERIOD_S):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

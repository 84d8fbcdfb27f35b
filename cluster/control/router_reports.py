"""What routers tell of the epochs that they hold. Pure, over times that its caller names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.control.head import Head
from moesaic.v1 import control_pb2

# Routers report every second. One that was silent for longer is not waited for when a change spreads.
LATELY_S = 5.0


@dataclass(frozen=True, slots=True)
class _Heard:
    report: control_pb2.ReportEpochsRequest
    at_s: float


class RouterReports:
    """The last report of each router. Times are seconds on one monotonic clock."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    def hear(self, report: control_pb2.ReportEpochsRequest, now_s: float) -> None:
        """A router that was restarted takes the place of its predecessor."""
        self._heard[report.router] = _Heard(report, now_s)

    def forget_before(self, time_s: float) -> None:
        """Routers that were silent since then are gone for good."""
        self._heard = {name: heard for name, heard in self._heard.items() if heard.at_s >= time_s}

    def spread(self, head: Head, now_s: float) -> tuple[int, int]:
        """How many of the routers that reported lately use the head for new requests, and how many reported."""
        canary = "" if head.canary is None else head.canary.epoch
        lately = list(self._lately(now_s))
        using = sum((report.epoch, report.canary) == (head.current, canary) for report in lately)
        return using, len(lately)

    def saw(self, revision: int, now_s: float) -> bool:
        """Whether every router that reported lately has a routing table of this revision, or a newer one."""
        return all(report.routing_table_revision >= revision for report in self._lately(now_s))

    def released(self, epoch: str, since_s: float) -> bool:
        """Whether every router has said after `since_s` that no sequence is or will be computed in the epoch.

        A silent router has not: it may still work. Without any router nobody has.
        """
        return bool(self._heard) and all(
            heard.at_s > since_s and epoch not in _held(heard.report) for heard in self._heard.values()
        )

    def pinned(self) -> frozenset[str]:
        """The epochs in which some router has sequences, or begins some."""
        return frozenset(epoch for heard in self._heard.values() for epoch in _held(heard.report))

    def of_epoch(self, epoch: str) -> list[control_pb2.EpochStats]:
        """What each router reports of one epoch."""
        return [
            stats for heard in self._heard.values() for stats in heard.report.epochs if stats.epoch == epoch
        ]

    def addresses(self, now_s: float) -> list[str]:
        """HOST:PORT of the routers that reported lately, by name."""
        return [report.address for report in self._lately(now_s)]

    def _lately(self, now_s: float) -> Iterator[control_pb2.ReportEpochsRequest]:
        for _, heard in sorted(self._heard.items()):
            if now_s - heard.at_s <= LATELY_S:
                yield heard.report


def _held(report: control_pb2.ReportEpochsRequest) -> frozenset[str]:
    open_ones = {stats.epoch for stats in report.epochs if stats.open_sequences}
    return frozenset({report.epoch, report.canary, *open_ones} - {""})

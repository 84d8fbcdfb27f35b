"""One attempt at the missing groups of a layer: calls to workers that are in flight together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from opentelemetry import trace

from router.dispatch.row_grouping import WorkerRows
from router.workers.worker_link import PendingCall, WorkerLink


@dataclass(slots=True, eq=False)
class WorkerCall:
    """The rows of one worker, sent to it in one message."""

    link: WorkerLink
    rows: WorkerRows
    # The version of each of the slots of `rows`.
    versions: list[bytes]
    pending: PendingCall
    span: trace.Span
    # When it was sent, on the dispatcher's clock.
    sent_s: float
    # The seconds until its answer was received; None before, and once the pool has been told.
    took_s: float | None = None
    # Whether its outcome is known, or of no interest any more.
    received: bool = False

    @property
    def num_rows(self) -> int:
        """The number of (token, expert) pairs."""
        return len(self.rows.assignments)


class Wave(NamedTuple):
    """The calls for some groups of a layer, each group asked of one replica."""

    # The groups, and for each of them the incarnations of the workers that are left out.
    excluded: Mapping[int, Collection[str]]
    # When waiting for the answers ends, on the monotonic clock.
    deadline_s: float
    calls: list[WorkerCall]
    # The calls that were sent in place of late ones.
    hedges: list[WorkerCall]

"""The other processes of the cluster, as one of them reaches them."""

from __future__ import annotations

from typing import Protocol

from cluster.control.process_report import ProcessReport


class Peers(Protocol):
    """The other processes of the cluster, looked up by name for every question."""

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        """The report of a process, as soon as its revision is not `seen`, at the latest after `hold_s`.

        Raises Unavailable when the process does not answer soon after `hold_s`.
        """
        ...

    async def address(self, name: str) -> str:
        """HOST:PORT of a process that listens. Raises Unavailable."""
        ...

"""The other processes of the cluster, as one of them sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.control.process_report import ProcessReport

if TYPE_CHECKING:
    pass


class Peers(Protocol):
    """The other processes of the cluster, looked up by name whenever they are asked."""

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        """The report of a process, at the latest after `hold_s` when it is still of revision `seen`.

        Raises Unavailable when the process does not answer soon after `hold_s`."""
        ...

    async def address(self, name: str) -> str:
        """HOST:PORT of a process that listens. Raises Unavailable."""
        ...

"""One process of the cluster: runs its server and reports on it.

A host takes its server from PENDING over LOADING to READY. A question for its report is held until something
changes, so that no polling is needed. A server that cannot start is reported as FAILED with the reason and is
started again: a file or memory that was missing may be there by then. A host knows nothing of Ray, whose
actor only passes calls on to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from cluster.control.process_report import ProcessReport
from moesaic.addresses import address_for_callers
from moesaic.errors import MoesaicError
from moesaic.garbage import freeze_lasting_objects
from moesaic.v1 import control_pb2

log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0


class HostedServer(Protocol):
    """A server as its host sees it. `start` may be called again after `stop`."""

    @property
    def loaded_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def contents_revision(self) -> int:
        """Grows whenever a server that serves holds other experts than before; 0 before it serves."""
        ...

    async def start(self) -> str:
        """Binds; returns HOST:PORT."""
        ...

    async def load(self) -> None:
        """Returns when the server serves."""
        ...

    async def stop(self, drain_s: float) -> None: ...


# Makes a server, which calls the function that it is given after every change of its contents, from any
# thread.
MakeServer = Callable[[Callable[[], object]], Awaitable[HostedServer]]


class ProcessHost:
    """Runs one server in this process and reports on it."""

    def __init__(
        self,
        name: str,
        make_server: MakeServer,
        *,
        node: str,
        restarts: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._make_server = make_server
        self._sleep = sleep
        self._server: HostedServer | None = None
        self._changed = asyncio.Condition()
        self._report = ProcessReport(
            name=name,
            revision=1,
            state=control_pb2.PROCESS_STATE_PENDING,
            address="",
            node=node,
            pid=os.getpid(),
            restarts=restarts,
        )

    async def run(self) -> None:
        """Returns when the server is READY; a failed start is reported and repeated."""
        retry_s = FIRST_RETRY_S
        while not await self._try_start():
            await self._sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)
        freeze_lasting_objects()

    async def report(self, seen: int, hold_s: float) -> ProcessReport:
        """The report, as soon as it differs from revision `seen`, at the latest after `hold_s`."""
        await self._note_contents()
        try:
            async with asyncio.timeout(hold_s), self._changed:
                await self._changed.wait_for(lambda: self._report.revision != seen)
        except TimeoutError:
            pass
        if self._server is None:
            return self._report
        return replace(
            self._report, loaded_bytes=self._server.loaded_bytes, total_bytes=self._server.total_bytes
        )

    async def stop(self, drain_s: float) -> None:
        """Lets running work end within `drain_s`, then stops the server."""
        await self._set_state(control_pb2.PROCESS_STATE_DRAINING)
        if self._server is not None:
            await self._server.stop(drain_s)
        await self._set_state(control_pb2.PROCESS_STATE_STOPPED)

    async def _try_start(self) -> bool:
        loop = asyncio.get_running_loop()
        try:
            self._server = await self._make_server(
                lambda: asyncio.run_coroutine_threadsafe(self._note_contents(), loop)
            )
            address = address_for_callers(await self._server.start(), self._report.node)
            await self._set_state(control_pb2.PROCESS_STATE_LOADING, address)
            await self._server.load()
        except Exception as error:  # the loop of this process: whatever went wrong is reported to the cluster
            log.exception("cannot start", extra={"fields": {"process": self._report.name}})
            await self._discard_server()
            await self._set_state(control_pb2.PROCESS_STATE_FAILED, detail=_reason(error))
            return False
        await self._set_state(control_pb2.PROCESS_STATE_READY, address)
        return True

    async def _discard_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        try:
            await server.stop(0.0)
        except Exception:  # the server is half built: the reported reason is why it could not start
            log.exception("cannot stop", extra={"fields": {"process": self._report.name}})

    async def _set_state(self, state: control_pb2.ProcessState, address: str = "", detail: str = "") -> None:
        async with self._changed:
            self._change(
                state=state, address=address, detail=detail, contents_revision=self._contents_revision()
            )

    async def _note_contents(self) -> None:
        """Reports a change if the server holds other contents than reported."""
        async with self._changed:
            if (revision := self._contents_revision()) != self._report.contents_revision:
                self._change(contents_revision=revision)

    def _contents_revision(self) -> int:
        return 0 if self._server is None else self._server.contents_revision

    def _change(self, **changes: Any) -> None:
        """Must be called inside the condition."""
        self._report = replace(self._report, revision=self._report.revision + 1, **changes)
        self._changed.notify_all()


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, MoesaicError) else f"{type(error).__name__}: {error}"

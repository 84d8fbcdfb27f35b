"""Keeps a router's epochs up to date: takes snapshots, puts their epochs in use, and ends what is overdue.

Runs on the event loop, as the book of epochs does. The engine's thread only learns which sequences to end and to shadow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from moesaic.epoch import Epoch, ExpertVersion
from moesaic.routing_table import Snapshot
from router.control.epochs import EpochBook
from router.dispatch.shadow import Shadow


class EpochEngine(Protocol):
    """The part of the engine that is told about epochs. All methods are thread-safe and return at once."""

    def open_sequences(self) -> Mapping[str, int]:
        """The number of open sequences by epoch."""
        ...

    def retire(self, epoch: str) -> None:
        """Ends the sequences of an epoch."""
        ...

    def set_shadow(self, shadow: Shadow | None) -> None:
        """Which sequences are shadowed from the next step on, and by what."""
        ...


class EpochKeeper:
    """The epochs of one router."""

    def __init__(
        self,
        book: EpochBook,
        engine: EpochEngine,
        missing: Callable[[Epoch], Collection[ExpertVersion]],
    ) -> None:
        """`missing`: the versions of an epoch that no replica holds."""
        self.book = book
        self._engine = engine
        self._missing = missing
        self._first = asyncio.Event()
        # Set after every change of what is in use or held, for whoever reports it.
        self.changed = asyncio.Event()
        self._known: tuple[str, ...] = ()

    async def wait_first(self) -> Epoch:
        """The current epoch, as soon as there is one."""
        await self._first.wait()
        assert self.book.current is not None
        return self.book.current

    def take(self, snapshot: Snapshot) -> None:
        """What the controller says now."""
        self.book.update(snapshot)
        self.settle()

    def settle(self) -> None:
        """Puts in use what replicas hold by now, and ends what is overdue. To be called now and then."""
        for epoch in self.book.settle(self._missing, self._engine.open_sequences()):
            self._engine.retire(epoch)
        self._engine.set_shadow(self.book.shadow)
        canary = self.book.canary
        known = (*(epoch.id for epoch in self.book.held), "" if canary is None else canary.epoch.id)
        if known != self._known:
            self._known = known
            self.changed.set()
        if self.book.current is not None:
            self._first.set()

"""Which slots of the state cache are free, belong to a running sequence, or hold a snapshot. Pure.

A snapshot is a copy of a recurrent state as it was at the end of a block, under the hash of that block (see
prefix_cache.py). Snapshots are evictable, the least recently used first. The pool records the copies to be
made, in order; `StateCache.apply` makes them before the next step, as states change in steps alone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Slot `target` receives the state of slot `source`; None stands for the state before the first token."""

    source: int | None
    target: int


class StatePool:
    """Slots for `num_running` sequences and `num_snapshots` snapshots, more while fewer sequences run."""

    def __init__(self, num_running: int, num_snapshots: int) -> None:
        if num_snapshots < 1:
            raise ValueError("a state that is copied needs a slot beside the running ones")
        self.num_slots = num_running + num_snapshots
        # The lowest numbers are taken first, so that short and long runs touch the same memory.
        self._free = list(range(self.num_slots - 1, -1, -1))
        # The slot of each snapshot by block hash, the least recently used first.
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()
        self._copies: list[StateCopy] = []

    def begin(self, block_hash: bytes | None) -> int:
        """A slot for a sequence that continues from the snapshot of that hash; None: from its first token."""
        source = None
        if block_hash is not None:
            self._snapshots.move_to_end(block_hash)
            source = self._snapshots[block_hash]
        slot = self._take()
        self._copies.append(StateCopy(source, slot))
        return slot

    def end(self, slot: int) -> None:
        """Frees the slot of a sequence."""
        self._free.append(slot)

    def snapshot(self, slot: int, block_hash: bytes) -> None:
        """Has a copy made of a running sequence's present state."""
        if block_hash not in self._snapshots:
            target = self._take()
            self._copies.append(StateCopy(slot, target))
            self._snapshots[block_hash] = target
        self._snapshots.move_to_end(block_hash)

    def has_snapshot(self, block_hash: bytes) -> bool:
        return block_hash in self._snapshots

    def discard_snapshots(self, block_hashes: Iterable[bytes]) -> None:
        """Frees the slots of those snapshots that exist."""
        for block_hash in block_hashes:
            slot = self._snapshots.pop(block_hash, None)
            if slot is not None:
                self._free.append(slot)

    def take_copies(self) -> tuple[StateCopy, ...]:
        """The copies that are to be made before the next step, in this order. Each is returned once."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def check_integrity(self, slots: Iterable[int]) -> None:
        """Asserts that every slot is free, holds a snapshot, or is one of the sequences' own `slots`."""
        where = Counter((*self._free, *self._snapshots.values(), *slots))
        assert len(where) == self.num_slots and set(where.values()) <= {1}, (
            f"state slots do not add up: {len(where)} of {self.num_slots}, "
            f"wrong: {sorted(slot for slot, places in where.items() if places != 1)}"
        )

    def _take(self) -> int:
        return self._free.pop() if self._free else self._snapshots.popitem(last=False)[1]

"""Which slots of the state cache are free, held, or kept for a prefix. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Slot `target` becomes what `source` is; None: the state before the first token."""

    source: int | None
    target: int


class StatePool:
    """Slots for `num_running` sequences, and `num_kept` more. Further states are kept where fewer sequences run."""

    def __init__(self, num_running: int, num_kept: int) -> None:
        if num_kept < 1:
            raise ValueError("a state that is copied needs a slot beside the running ones")
        self.num_slots = num_running + num_kept
        # Lowest numbers first, so that a short test and a long day touch the same memory.
        self._free = list(range(self.num_slots - 1, -1, -1))
        # By name, the one that was used longest ago first.
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._copies: list[StateCopy] = []

    def begin(self, name: bytes | None) -> int:
        """A slot for a sequence that goes on from the kept state of that name; None: from its first token."""
        source = None
        if name is not None:
            self._kept.move_to_end(name)
            source = self._kept[name]
        slot = self._take()
        self._copies.append(StateCopy(source, slot))
        return slot

    def end(self, slot: int) -> None:
        """A sequence lets go of its slot."""
        self._free.append(slot)

    def keep(self, slot: int, name: bytes) -> None:
        """Keeps a copy of a running sequence's state as it is now."""
        if name not in self._kept:
            kept = self._take()
            self._copies.append(StateCopy(slot, kept))
            self._kept[name] = kept
        self._kept.move_to_end(name)

    def has(self, name: bytes) -> bool:
        return name in self._kept

    def forget(self, names: Iterable[bytes]) -> None:
        """These states are not found any more."""
        for name in names:
            slot = self._kept.pop(name, None)
            if slot is not None:
                self._free.append(slot)

    def take_copies(self) -> tuple[StateCopy, ...]:
        """What is to be copied before the next step, in this order; told once."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def check_integrity(self, slots: Iterable[int]) -> None:
        """Asserts that every slot is free, kept, or the own slot of one of these sequences."""
        where = Counter((*self._free, *self._kept.values(), *slots))
        assert len(where) == self.num_slots and set(where.values()) <= {1}, (
            f"state slots do not add up: {len(where)} of {self.num_slots}, "
            f"wrong: {sorted(slot for slot, places in where.items() if places != 1)}"
        )

    def _take(self) -> int:
        return self._free.pop() if self._free else self._kept.popitem(last=False)[1]

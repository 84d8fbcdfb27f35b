"""Recurrent states in slots: a pool that counts, and the tensors. For mixers whose past is a state of constant size.

The pool is pure bookkeeping and can prove itself: every slot is free, the own slot of one running sequence, or kept. A
kept slot is a copy of a state as it was at the end of a block, under the name of that block (see prefix_cache.py); the
one that was used longest ago goes first. What is to be copied the pool writes down, in order; `StateCache.apply` does
it before the next step, as only a step changes a state.

Shapes: N slots, D channels, S modes of a channel, K taps of the short filter, n sequences with one token each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import Hyena, Mixer
from router.scheduling.sequence import Chunk


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


class StateCache:
    """The tensors of all layers that have a state: the short filter's past inputs, and the modes of the long one."""

    def __init__(
        self,
        mixers: Sequence[Mixer],
        num_channels: int,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype` is that of the past inputs; the modes are complex64. All layers with a state are alike."""
        recurrent = {layer: mixer for layer, mixer in enumerate(mixers) if isinstance(mixer, Hyena)}
        mixer = next(iter(recurrent.values()))
        self._places = {layer: place for place, layer in enumerate(recurrent)}
        own = (len(recurrent), num_slots)
        self._inputs = torch.zeros(*own, mixer.short_filter - 1, 3 * num_channels, dtype=dtype, device=device)
        self._modes = torch.zeros(*own, mixer.state_size, num_channels, dtype=torch.complex64, device=device)

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of one layer in all slots, to be read and written: [N, K - 1, 3 D] and complex [N, S, D]."""
        place = self._places[layer]
        return self._inputs[place], self._modes[place]

    def apply(self, copies: Iterable[StateCopy]) -> None:
        """Makes these copies, one after the other."""
        for copy in copies:
            for states in (self._inputs, self._modes):
                if copy.source is None:
                    states[:, copy.target] = 0
                else:
                    states[:, copy.target] = states[:, copy.source]


@dataclass(frozen=True, slots=True, eq=False)
class StateRows:
    """Which rows of a batch go on from which slots."""

    # One token of each of n sequences.
    rows: torch.Tensor  # [n]
    slots: torch.Tensor  # [n]
    # Several tokens of one sequence each: their rows and its slot.
    runs: tuple[tuple[slice, int], ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], first_rows: Sequence[int], device: torch.device) -> StateRows:
        single: list[tuple[int, int]] = []
        runs = []
        for chunk, first in zip(chunks, first_rows, strict=True):
            slot = chunk.sequence.state
            assert slot is not None, "a running sequence has a state"
            if chunk.num_tokens == 1:
                single.append((first, slot))
            else:
                runs.append((slice(first, first + chunk.num_tokens), slot))
        rows, slots = torch.tensor(single, dtype=torch.long).view(-1, 2).t().to(device)
        return cls(rows, slots, tuple(runs))

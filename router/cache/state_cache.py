"""Recurrent states in slots: a pool that counts, and the tensors. For mixers whose past is a state of constant size.

The pool is pure bookkeeping and can prove itself: every slot is free, the own slot of one running sequence, or kept. A
kept slot is a copy of a state as it was at the end of a block, under the name of that block (see prefix_cache.py); the
one that was used longest ago goes first. What is to be copied the pool writes down, in order; `StateCache.apply` does
it before the next step, as only a step changes a state.

Shapes: N slots, D channels, S modes of a channel, K taps of the short filter, n sequences with one token each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import Hyena, Mixer
from router.scheduling.sequence import Chunk
from router.scheduling.state_pool import StateCopy


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

"""Recurrent states in slots, for mixers with a state of constant size. state_pool.py allocates the slots.

Shapes: N slots, D channels, S modes of a channel, K taps of the short filter, n sequences of one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import Hyena, Mixer
from router.scheduling.sequence import Chunk
from router.scheduling.state_pool import StateCopy


class StateCache:
    """The states of all recurrent layers: past inputs of the short filter and modes of the long one."""

    def __init__(
        self,
        mixers: Sequence[Mixer],
        num_channels: int,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype` is that of the past inputs; the modes are complex64. All states have one shape."""
        recurrent = {layer: mixer for layer, mixer in enumerate(mixers) if isinstance(mixer, Hyena)}
        mixer = next(iter(recurrent.values()))
        self._indices = {layer: index for index, layer in enumerate(recurrent)}
        own = (len(recurrent), num_slots)
        self._inputs = torch.zeros(*own, mixer.short_filter - 1, 3 * num_channels, dtype=dtype, device=device)
        self._modes = torch.zeros(*own, mixer.state_size, num_channels, dtype=torch.complex64, device=device)

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of one layer in all slots, to read and write: [N, K - 1, 3 D] and complex [N, S, D]."""
        index = self._indices[layer]
        return self._inputs[index], self._modes[index]

    def apply(self, copies: Iterable[StateCopy]) -> None:
        """Makes these copies in order."""
        for copy in copies:
            for states in (self._inputs, self._modes):
                if copy.source is None:
                    states[:, copy.target] = 0
                else:
                    states[:, copy.target] = states[:, copy.source]


@dataclass(frozen=True, slots=True, eq=False)
class StateRows:
    """Which rows of a batch continue from which slots."""

    # Rows and slots of the n sequences with one token.
    rows: torch.Tensor  # [n]
    slots: torch.Tensor  # [n]
    # The rows and the slot of each sequence with several tokens.
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

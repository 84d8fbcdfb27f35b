"""The tensors of recurrent states: copied in order, and addressed by the rows of a batch."""

from __future__ import annotations

import torch

from moesaic.families.model import Attention, Hyena
from router.cache.state_cache import StateCache, StateRows
from router.scheduling.sequence import Chunk, Sequence
from router.scheduling.state_pool import StateCopy

BLOCK = 4
CPU = torch.device("cpu")


def test_copies_are_made_in_order_and_of_all_layers() -> None:
    mixers = (Hyena(2, 3, 1), Attention(1, 1, 4), Hyena(2, 3, 1))
    cache = StateCache(mixers, 4, num_slots=3, dtype=torch.bfloat16, device=CPU)
    for layer in (0, 2):
        inputs, modes = cache.of(layer)
        assert inputs.shape == (3, 2, 12) and inputs.dtype == torch.bfloat16
        assert modes.shape == (3, 2, 4) and modes.dtype == torch.complex64
        inputs[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None] + layer
        modes[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None] * 1j
    cache.apply([StateCopy(0, 2), StateCopy(1, 0), StateCopy(None, 1)])
    for layer in (0, 2):
        inputs, modes = cache.of(layer)
        assert inputs[:, 0, 0].tolist() == [2 + layer, 0, 1 + layer]
        assert modes[:, 1, 3].imag.tolist() == [2, 0, 1]


def test_rows_of_a_batch_know_their_slots() -> None:
    sequences = [Sequence(str(index), [0] * 9, 9, state=10 + index) for index in range(3)]
    chunks = (Chunk(sequences[0], 4, 1), Chunk(sequences[1], 0, 5), Chunk(sequences[2], 8, 1))
    found = StateRows.of(chunks, (0, 1, 6), CPU)
    assert found.rows.tolist() == [0, 6] and found.slots.tolist() == [10, 12]
    assert found.runs == ((slice(1, 6), 11),)

"""One more expert per layer of a checkpoint."""

from __future__ import annotations

import torch
from newcomer import Newcomer, with_newcomers

D, F, E = 4, 3, 2


def _base() -> dict[str, torch.Tensor]:
    return {
        "model.layers.0.block_sparse_moe.gate.weight": torch.arange(E * D).view(E, D).to(torch.bfloat16),
        "model.norm.weight": torch.ones(D, dtype=torch.bfloat16),
    }


def test_a_newcomer_takes_the_slot_after_the_last_and_the_base_stays_as_it_was() -> None:
    base = _base()
    newcomer = Newcomer(torch.full((D,), 9.0), torch.ones(F, D), torch.ones(D, F), torch.zeros(F, D))

    tensors = with_newcomers(base, [newcomer])

    gate = tensors.pop("model.layers.0.block_sparse_moe.gate.weight")
    assert torch.equal(gate[:E], base["model.layers.0.block_sparse_moe.gate.weight"])
    assert torch.equal(gate[E].float(), newcomer.gate_row)
    assert torch.equal(tensors.pop("model.norm.weight"), base["model.norm.weight"])
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.layers.0.block_sparse_moe.experts.2.w1.weight": (F, D),
        "model.layers.0.block_sparse_moe.experts.2.w2.weight": (D, F),
        "model.layers.0.block_sparse_moe.experts.2.w3.weight": (F, D),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}

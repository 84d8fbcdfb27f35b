"""The floors of the GPU benchmark, and the model that it makes without writing its experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from h200 import mixtral
from harness.floors import (
    decode_bytes,
    distinct_experts,
    expert_parameters,
    prefill_floor_s,
    prefill_flops,
    router_parameters,
    token_cache_bytes,
    weight_bytes,
)
from harness.random_experts import fill_expert
from harness.sparse_checkpoint import write_sparse_checkpoint
from random_checkpoint import Shape
from safetensors import safe_open

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import describe_model

MIXTRAL = mixtral(layers=32)
TINY = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocabulary=128)
GB = 1e9


@pytest.mark.parametrize(("tokens", "expected"), [(1, 2.0), (4, 8 * (1 - 0.75**4)), (1000, 8.0)])
def test_tokens_share_experts_as_uniform_routing_has_it(tokens: int, expected: float) -> None:
    assert distinct_experts(MIXTRAL, tokens) == pytest.approx(expected)


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 25.5), (4, 64.6), (16, 92.2), (64, 93.1)])
def test_a_step_of_mixtral_reads_the_weights_that_the_paper_says(batch: int, gigabytes: float) -> None:
    assert weight_bytes(MIXTRAL, batch, 2) / GB == pytest.approx(gigabytes, rel=5e-3)


def test_keys_and_values_of_all_contexts_are_read_beside_the_weights() -> None:
    assert token_cache_bytes(MIXTRAL, 2) == 128 << 10
    cached = decode_bytes(MIXTRAL, 64, 1024, 2) - weight_bytes(MIXTRAL, 64, 2)
    assert cached / GB == pytest.approx(8.6, rel=5e-3)


def test_a_token_costs_two_operations_a_parameter_that_it_meets() -> None:
    one = prefill_flops(MIXTRAL, 1)
    met = router_parameters(MIXTRAL) + 32 * 2 * expert_parameters(MIXTRAL)
    assert one == pytest.approx(2 * met, rel=1e-3)
    # The head is met by one token alone, attention grows with the square.
    assert 1.9 * 1024 < prefill_flops(MIXTRAL, 2048) / one < 2.2 * 1024


def test_a_short_prompt_is_bound_by_the_weights_and_a_long_one_by_the_products() -> None:
    rates = {"bytes_per_s": 4.3e12, "flops_per_s": 7.9e14}
    assert prefill_floor_s(MIXTRAL, 64, 2, **rates) == weight_bytes(MIXTRAL, 64, 2) / 4.3e12
    assert prefill_floor_s(MIXTRAL, 2048, 2, **rates) == prefill_flops(MIXTRAL, 2048) / 7.9e14


def test_a_sparse_checkpoint_is_a_whole_one_to_whoever_reads_its_headers(tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "model", TINY)
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    assert (model.num_slots, model.dtype) == ({0: 8, 1: 8}, "bfloat16")
    name = "model.layers.1.self_attn.k_proj.weight"
    with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
        stored = file.get_tensor(name)
    assert stored.shape == (32, 64) and float(stored.float().std()) == pytest.approx(64**-0.5, rel=0.1)


def test_its_experts_take_no_room_on_the_disk(tmp_path: Path) -> None:
    shape = Shape(hidden=256, inner=4096, layers=1, heads=4, kv_heads=2, vocabulary=128)
    folder = write_sparse_checkpoint(tmp_path / "model", shape)
    files = [file.stat() for file in folder.glob("*.safetensors")]
    experts = 2 * shape.experts * expert_parameters(shape)
    assert sum(file.st_size for file in files) > experts
    assert sum(512 * file.st_blocks for file in files) < experts / 10


def test_every_process_makes_the_same_expert_and_no_two_are_alike() -> None:
    def made(layer: int, slot: int) -> torch.Tensor:
        gate_up, down = torch.empty(128, 64), torch.empty(64, 64)
        fill_expert(gate_up, down, layer, slot)
        return torch.cat((gate_up, down))

    assert torch.equal(made(3, 1), made(3, 1))
    assert not torch.equal(made(3, 1), made(1, 3))
    assert not torch.equal(made(0, 1), made(0, 2))

"""The reference checkpoints of the decoder-only families, in both spellings of their configs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.families import MoeModel, describe_model
from moesaic.families.model import Attention, GateRule, Groups, LatentAttention

pytestmark = pytest.mark.shared

GATES = {
    "deepseek-v3": GateRule(
        top_k=4,
        score="sigmoid",
        selection_bias=True,
        groups=Groups(count=4, keep=2, best=2),
        renormalise=True,
        epsilon=1e-20,
        scale=2.5,
    ),
    "flex-olmo": GateRule(top_k=5),
    "gpt-oss": GateRule(top_k=2, score="logit", weight="softmax", biased=True),
    "olmoe": GateRule(top_k=3),
    "qwen2-moe": GateRule(top_k=2),
    "qwen3-moe": GateRule(top_k=2, renormalise=True),
}
_SMALL_HEADS = Attention(num_heads=4, num_kv_heads=2, head_dim=16)
MIXERS = {
    "deepseek-v3": (LatentAttention(num_heads=4, latent_dim=20, rotary_dim=8, key_dim=16, value_dim=12),) * 3,
    "flex-olmo": (Attention(num_heads=4, num_kv_heads=4, head_dim=12),) * 2,
    "gpt-oss": (
        replace(_SMALL_HEADS, window=8, sinks=True),
        replace(_SMALL_HEADS, sinks=True),
    ),
    "olmoe": (Attention(num_heads=4, num_kv_heads=4, head_dim=12),) * 2,
    "qwen2-moe": (Attention(num_heads=4, num_kv_heads=2, head_dim=12),) * 2,
    "qwen3-moe": (_SMALL_HEADS,) * 2,
}
NAMES = sorted(GATES)


def checkpoint(shared: Path, name: str) -> Checkpoint:
    return open_checkpoint(shared / "goldens" / name / "checkpoint")


def describe(shared: Path, name: str) -> MoeModel:
    return describe_model(checkpoint(shared, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_checkpoint_is_described_to_the_last_parameter(shared: Path, name: str) -> None:
    model = describe(shared, name)
    tensors = checkpoint(shared, name).tensors.values()
    assert model.num_parameters == sum(math.prod(tensor.shape) for tensor in tensors)
    sources = {tensor.source for tensor in model.dense.values()}
    assert sources | model.expert_tensors == {tensor.name for tensor in tensors}
    assert not sources & model.expert_tensors


@pytest.mark.parametrize("name", NAMES)
def test_gate_and_mixers_are_those_of_the_family(shared: Path, name: str) -> None:
    model = describe(shared, name)
    assert model.family == name.replace("-", "_")
    assert {experts.gate for experts in model.experts.values()} == {GATES[name]}
    assert model.mixers == MIXERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_spelling_of_the_config_says_the_same(shared: Path, name: str) -> None:
    rewritten = checkpoint(shared, name)
    config = json.loads((shared / "goldens" / name / "config_v4.json").read_text())
    assert describe_model(replace(rewritten, config=config)) == describe_model(rewritten)

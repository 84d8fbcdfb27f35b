"""GraniteMoE: experts in two stacked tensors under either set of names."""

from __future__ import annotations

import pytest
from support.tiny_families import tiny_index, with_config

from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import GateRule, WeightPattern

BLOCK = "model.layers.{layer}.block_sparse_moe."


@pytest.mark.parametrize(
    ("joined", "gate_up", "gate"),
    [
        (False, "input_linear.weight", "router.layer.weight"),
        (True, "experts.gate_up_proj", "router.weight"),
    ],
)
def test_gate_rows_lie_above_up_rows_in_one_tensor(joined: bool, gate_up: str, gate: str) -> None:
    model = describe_model(tiny_index("granitemoe", joined=joined))
    assert model.experts[1].layout["up"] == WeightPattern(BLOCK + gate_up, stacked=True, part=(1, 2))
    assert model.dense[BLOCK.format(layer=1) + "router.weight"].source == BLOCK.format(layer=1) + gate


def test_weights_are_the_softmax_over_the_chosen_alone() -> None:
    model = describe_model(tiny_index("granitemoe"))
    assert model.experts[0].gate == GateRule(2, score="logit", weight="softmax")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size", 12),
        ("num_local_experts", 3),
        ("num_experts_per_tok", 5),
        ("hidden_act", "gelu"),
        ("num_hidden_layers", 2),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(tiny_index("granitemoe"), **{key: value}))
    assert refused.value.field == f"config.json: {key}"

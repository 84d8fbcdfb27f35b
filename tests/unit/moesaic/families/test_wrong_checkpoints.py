"""Whatever a checkpoint says, it is described or refused with the name of what is wrong; it is never an accident."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from support.tiny_families import TINY, an_entry, tiny_index, with_config, with_entries

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.mistral_params import MAX_LAYERS
from moesaic.errors import CheckpointError
from moesaic.families import describe_model, generic
from moesaic.families.decoder import MAX_SLOTS

# Nothing, wrong kinds, and numbers that nobody can count up to or that no float holds.
VALUES = [None, -1, 0, 0.5, "x", [], [None], [None] * 3, {"a": 1}, 10**9, 10**400]
MAY_BE_THERE = [
    "first_k_dense_replace",
    "layer_types",
    "quantization_config",
    "rope_scaling",
    "sliding_window",
]
# Of those without a module of their own, one for each way to be read.
FAMILIES = [*sorted(TINY.keys() - generic.NAMES), "glm4_moe_lite", "granitemoe_swa", "hunyuan_v1_moe"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (7,), (2, 3), (1, 1, 1, 1)]

tiny = cache(tiny_index)


def refusals(checkpoint: Checkpoint) -> Iterator[CheckpointError]:
    """None or one."""
    try:
        describe_model(checkpoint, dense_layers="experts")
    except CheckpointError as error:
        yield error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_any_values_is_described_or_refused(family: str) -> None:
    index = tiny(family)
    for key in index.config.keys() | MAY_BE_THERE:
        for value in VALUES:
            for refused in refusals(with_config(index, **{key: value})):
                assert refused.field is not None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_any_shape_are_described_or_refused(family: str) -> None:
    index = tiny(family)
    for name, entry in index.tensors.items():
        others = [an_entry(name, "F32", *shape) for shape in SHAPES]
        others += [an_entry(name, dtype, *entry.shape) for dtype in ("F8_E4M3", "U8", "I64")]
        for other in others:
            for refused in refusals(with_entries(index, other)):
                assert refused.field is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("keys", "most"),
    [
        (("num_hidden_layers",), MAX_LAYERS),
        (("num_experts", "num_local_experts", "n_routed_experts"), MAX_SLOTS),
    ],
)
def test_more_than_any_model_has_is_refused_by_the_key(family: str, keys: tuple[str, ...], most: int) -> None:
    index = tiny(family)
    changes = {key: most + 1 for key in keys if key in index.config}
    (refused,) = refusals(with_config(index, **changes))
    assert refused.field in {f"config.json: {key}" for key in changes}
    assert refused.message.endswith(f"must be at most {most}")


def test_experts_that_a_config_promises_are_not_listed_before_they_are_found() -> None:
    index = tiny("deepseek_v3")
    gates = [name for name in index.tensors if name.endswith(".gate.weight")]
    tensors = {name: entry for name, entry in index.tensors.items() if name not in gates}
    promising = with_config(replace(index, tensors=tensors), n_routed_experts=MAX_SLOTS)
    (refused,) = refusals(promising)
    assert refused.field == gates[0]

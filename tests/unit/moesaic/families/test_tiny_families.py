"""Random tiny models of every family, as transformers writes them: described whole, with nothing left over, and every
weight where the modules of transformers have it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.described_tensors import read_described
from support.tiny_families import TINY, random_model, write_family
from transformers import PreTrainedModel

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import MoeModel, describe_model, generic
from moesaic.families.model import GateRule

# What may differ between two models of a family.
_VARIANTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "deepseek_v2": {
        "q_lora_rank": st.sampled_from([None, 20]),
        "n_shared_experts": st.sampled_from([1, 2]),
        "first_k_dense_replace": st.integers(0, 2),
        "attention_bias": st.booleans(),
    },
    "deepseek_v3": {
        "q_lora_rank": st.sampled_from([None, 20]),
        "n_shared_experts": st.sampled_from([1, 2]),
        "first_k_dense_replace": st.integers(0, 2),
        "n_group": st.sampled_from([2, 4]),
        "topk_group": st.just(2),
        "attention_bias": st.booleans(),
    },
    "flex_olmo": {"attention_bias": st.booleans()},
    "glm4_moe": {
        "attention_bias": st.booleans(),
        "use_qk_norm": st.booleans(),
        "first_k_dense_replace": st.integers(0, 2),
        "head_dim": st.sampled_from([8, 12]),
    },
    "gpt_oss": {"attention_bias": st.booleans(), "head_dim": st.sampled_from([8, 12])},
    "granitemoe": {"attention_bias": st.booleans()},
    "llama4_text": {
        "attention_bias": st.booleans(),
        "interleave_moe_layer_step": st.sampled_from([1, 2]),
        "num_experts_per_tok": st.just(1),
    },
    "olmoe": {"attention_bias": st.booleans()},
    "phimoe": {
        "attention_bias": st.booleans(),
        "lm_head_bias": st.booleans(),
        "num_experts_per_tok": st.just(2),
    },
    "qwen2_moe": {
        "qkv_bias": st.booleans(),
        "decoder_sparse_step": st.sampled_from([1, 2]),
        "mlp_only_layers": st.sampled_from([[], [2]]),
        "shared_expert_intermediate_size": st.sampled_from([8, 20]),
        "use_sliding_window": st.booleans(),
    },
    "qwen3_moe": {
        "attention_bias": st.booleans(),
        "head_dim": st.sampled_from([8, 12]),
        "decoder_sparse_step": st.sampled_from([1, 2]),
        "norm_topk_prob": st.booleans(),
    },
}
_ANY: dict[str, st.SearchStrategy[Any]] = {
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "num_experts_per_tok": st.integers(1, 3),
    "tie_word_embeddings": st.booleans(),
}
_FAMILIES = sorted(_VARIANTS)


def describe(model: PreTrainedModel, *, joined: bool) -> tuple[MoeModel, dict[str, torch.Tensor]]:
    """The description of what transformers writes, with all tensors read by it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_family(Path(folder), model, joined=joined))
        described = describe_model(checkpoint, dense_layers="router")
        return described, read_described(checkpoint, described)


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, a tied head once."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def experts_of(model: PreTrainedModel, described: MoeModel) -> dict[str, torch.Tensor]:
    """The weights of all experts as the modules have them, as `LAYER.SLOT.WEIGHT`."""
    state = model.state_dict()
    weights = {}
    for layer in described.experts:
        prefix = f"model.layers.{layer}."
        (joined,) = (n for n in state if n.startswith(prefix) and n.endswith(".experts.gate_up_proj"))
        experts = joined.removesuffix("gate_up_proj")
        for slot in range(described.num_slots[layer]):
            for name, tensor in _one_expert(model, state, experts, slot).items():
                weights[f"{layer}.{slot}.{name}"] = tensor
    return weights


def _one_expert(
    model: PreTrainedModel, state: dict[str, torch.Tensor], prefix: str, slot: int
) -> dict[str, torch.Tensor]:
    gate_up, down = state[prefix + "gate_up_proj"][slot], state[prefix + "down_proj"][slot]
    if model.config.model_type == "gpt_oss":
        bias = state[prefix + "gate_up_proj_bias"][slot]
        return {
            "gate": gate_up[:, ::2].t(),
            "up": gate_up[:, 1::2].t(),
            "down": down.t(),
            "gate_bias": bias[::2],
            "up_bias": bias[1::2],
            "down_bias": state[prefix + "down_proj_bias"][slot],
        }
    if model.config.model_type == "llama4_text":
        gate_up, down = gate_up.t(), down.t()
    gate, up = gate_up.chunk(2)
    return {"gate": gate, "up": up, "down": down}


def assert_described(model: PreTrainedModel, *, joined: bool) -> MoeModel:
    described, tensors = describe(model, joined=joined)
    state = state_of(model)
    dense = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    expected = dense | experts_of(model, described)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert described.num_parameters == sum(tensor.numel() for tensor in state.values())
    assert described.num_active_parameters <= described.num_parameters
    assert len(described.mixers) == model.config.num_hidden_layers
    return described


@pytest.mark.parametrize("family", _FAMILIES)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_random_model_is_described_whole_in_both_forms(family: str, data: st.DataObject) -> None:
    overrides = data.draw(st.fixed_dictionaries(_ANY | _VARIANTS[family]))
    model = random_model(family, **overrides)
    published, joined = (assert_described(model, joined=joined) for joined in (False, True))
    assert (published.family, published.mixers, published.num_slots) == (
        joined.family,
        joined.mixers,
        joined.num_slots,
    )
    assert {layer: experts.gate for layer, experts in published.experts.items()} == {
        layer: experts.gate for layer, experts in joined.experts.items()
    }


@pytest.mark.parametrize("family", sorted(generic.NAMES))
def test_a_family_without_a_module_is_described_whole_with_its_own_gate(family: str) -> None:
    model = random_model(family)
    for joined in (False, True):
        described = assert_described(model, joined=joined)
        assert {experts.gate for experts in described.experts.values()} == {GateRule(2, own=True)}


def test_every_family_that_has_tiny_sizes_is_tested() -> None:
    assert TINY.keys() == _VARIANTS.keys() | generic.NAMES


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text", "qwen3_moe"])
def test_dense_layers_among_others_are_experts_where_they_are_asked_to_be(
    family: str, tmp_path: Path
) -> None:
    sparse_every = {"decoder_sparse_step": 2} if family == "qwen3_moe" else {}
    if family == "llama4_text":
        sparse_every = {"interleave_moe_layer_step": 2}
    model = random_model(family, **sparse_every)
    checkpoint = open_checkpoint(write_family(tmp_path, model))
    described = describe_model(checkpoint, dense_layers="experts")
    dense = [layer for layer, experts in described.experts.items() if experts.gate is None]
    assert dense and described.num_slots[dense[0]] == 1
    tensors, state = read_described(checkpoint, described), model.state_dict()
    for layer in dense:
        for weight, name in described.experts[layer].parameters.items():
            assert torch.equal(tensors[f"{layer}.0.{weight}"], state[name.format(layer=layer)])
    in_router = describe_model(checkpoint)
    assert in_router.num_parameters == described.num_parameters
    assert not in_router.num_slots.keys() & set(dense)

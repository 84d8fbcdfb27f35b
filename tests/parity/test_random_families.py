"""Every family in configs that nobody picked: sizes, heads, biases, norms, shared experts and dense layers at random,
against transformers in this very process, so that nothing is made to fit the goldens.

The router's model is the real one, over checkpoints on disk; experts are computed here, one by one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.local_router import LocalRouter, lonely_router
from support.random_models import random_model, reference_logits, write_model
from support.tiny_families import SIZES, TINY
from transformers import CONFIG_MAPPING, PreTrainedModel

from moesaic.families import DenseLayers, generic

LOGITS_TOLERANCE = 1e-4
NUM_NEW = 3
VOCAB = 64
# Short and long enough to cross windows, chunks and blocks.
PROMPT_LENGTHS = (1, 9, 37)

Draw = Callable[[st.SearchStrategy[Any]], Any]
Config = dict[str, Any]


def heads(draw: Draw, *, own_size: bool, grouped: bool = True) -> Config:
    """Sizes of the hidden state and of attention; `own_size` where a head need not be a share of the hidden state."""
    num_heads = draw(st.sampled_from([2, 4]))
    head_dim = draw(st.sampled_from([8, 12]))
    num_kv_heads = draw(st.sampled_from([1, num_heads // 2, num_heads])) if grouped else num_heads
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    if own_size:
        return sizes | {"head_dim": head_dim, "hidden_size": draw(st.sampled_from([24, 40]))}
    return sizes | {"hidden_size": num_heads * head_dim}


def sizes(draw: Draw, *, num_layers: int = 2, own_size: bool = False, grouped: bool = True) -> Config:
    """What all families have."""
    return {
        "vocab_size": VOCAB,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 128,
        "intermediate_size": draw(st.sampled_from([16, 28])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 1e4]))},
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **heads(draw, own_size=own_size, grouped=grouped),
    }


def slots(draw: Draw, key: str = "num_local_experts") -> Config:
    count = draw(st.integers(2, 8))
    return {key: count, "num_experts_per_tok": draw(st.integers(1, count))}


def flag(draw: Draw, *keys: str) -> Config:
    return {key: draw(st.booleans()) for key in keys}


def mixtral(draw: Draw) -> Config:
    return sizes(draw, own_size=True) | slots(draw) | {"sliding_window": draw(st.sampled_from([None, 5]))}


def mistral(draw: Draw) -> Config:
    return sizes(draw, own_size=True) | {"sliding_window": draw(st.sampled_from([None, 5, 16]))}


def ministral(draw: Draw) -> Config:
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    return sizes(draw, own_size=True, num_layers=3) | {
        "sliding_window": 5,
        "layer_types": draw(st.lists(kinds, min_size=3, max_size=3)),
    }


def llama(draw: Draw) -> Config:
    return sizes(draw, own_size=True) | flag(draw, "attention_bias", "mlp_bias")


def sparse_layers(draw: Draw) -> Config:
    """Which of three layers have experts: one at least."""
    step = draw(st.sampled_from([1, 2]))
    return {
        "decoder_sparse_step": step,
        "mlp_only_layers": draw(st.sampled_from([[], [0], [2]])),
        "num_hidden_layers": 3,
    }


def qwen2_moe(draw: Draw) -> Config:
    return {
        **(sizes(draw) | slots(draw, "num_experts") | sparse_layers(draw)),
        **flag(draw, "qkv_bias", "norm_topk_prob", "use_sliding_window"),
        "sliding_window": 5,
        "max_window_layers": draw(st.integers(0, 3)),
        "moe_intermediate_size": draw(st.sampled_from([12, 20])),
        "shared_expert_intermediate_size": draw(st.sampled_from([8, 20])),
    }


def qwen3_moe(draw: Draw) -> Config:
    return {
        **(sizes(draw, own_size=True) | slots(draw) | sparse_layers(draw)),
        **flag(draw, "attention_bias", "norm_topk_prob"),
        "moe_intermediate_size": draw(st.sampled_from([12, 20])),
    }


def olmoe(draw: Draw) -> Config:
    return {
        **(sizes(draw) | slots(draw, "num_experts") | flag(draw, "attention_bias", "norm_topk_prob")),
        "clip_qkv": draw(st.sampled_from([None, 0.5])),
    }


def flex_olmo(draw: Draw) -> Config:
    return sizes(draw) | slots(draw, "num_experts") | flag(draw, "attention_bias", "norm_topk_prob")


def groups(draw: Draw) -> Config:
    """Experts in groups, of which enough are kept."""
    count = draw(st.sampled_from([1, 2, 4]))
    keep = draw(st.integers(1, count))
    return {
        "n_routed_experts": 8,
        "n_group": count,
        "topk_group": keep,
        "num_experts_per_tok": draw(st.integers(1, min(4, keep * 8 // count))),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "n_shared_experts": draw(st.integers(1, 2)),
        "moe_intermediate_size": draw(st.sampled_from([12, 20])),
        "first_k_dense_replace": draw(st.integers(0, 2)),
    }


def latent(draw: Draw) -> Config:
    """Multi-head latent attention."""
    return {
        "q_lora_rank": draw(st.sampled_from([None, 12])),
        "kv_lora_rank": draw(st.sampled_from([8, 20])),
        "qk_rope_head_dim": draw(st.sampled_from([4, 8])),
        "qk_nope_head_dim": draw(st.sampled_from([8, 12])),
        "v_head_dim": draw(st.sampled_from([8, 20])),
    }


def yarn(draw: Draw) -> Config:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": draw(st.sampled_from([0.0, 1.0])),
        }
    }


def deepseek_v2(draw: Draw) -> Config:
    config = sizes(draw, num_layers=3, grouped=False) | groups(draw) | latent(draw)
    config |= draw(st.sampled_from([{}, yarn(draw)]))
    config["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return config


def deepseek_v3(draw: Draw) -> Config:
    config = sizes(draw, num_layers=3, grouped=False) | groups(draw) | latent(draw)
    config |= draw(st.sampled_from([{}, yarn(draw)]))
    return config | flag(draw, "attention_bias", "norm_topk_prob", "rope_interleave")


def gpt_oss(draw: Draw) -> Config:
    config = sizes(draw, own_size=True, num_layers=3) | slots(draw)
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": draw(st.booleans()),
        "original_max_position_embeddings": 32,
    }
    return config | {
        "sliding_window": 6,
        "layer_types": draw(st.lists(kinds, min_size=3, max_size=3)),
        "rope_parameters": draw(st.sampled_from([config["rope_parameters"], parameters])),
        "tie_word_embeddings": False,
    }


def phimoe(draw: Draw) -> Config:
    config = sizes(draw) | slots(draw) | flag(draw, "attention_bias", "lm_head_bias")
    pairs = config["hidden_size"] // config["num_attention_heads"] // 2
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [2.0] * pairs,
        "short_mscale": 1.2,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 64,
    }
    return config | {
        "num_local_experts": draw(st.sampled_from([4, 16])),
        "num_experts_per_tok": 2,
        "sliding_window": draw(st.sampled_from([None, 5])),
        "rope_parameters": draw(st.sampled_from([config["rope_parameters"], longrope])),
        "tie_word_embeddings": False,
    }


def granitemoe(draw: Draw) -> Config:
    return {
        **(sizes(draw) | slots(draw) | flag(draw, "attention_bias")),
        "embedding_multiplier": draw(st.sampled_from([1.0, 3.0])),
        "logits_scaling": draw(st.sampled_from([1.0, 2.0])),
        "residual_multiplier": draw(st.sampled_from([1.0, 0.5])),
        "attention_multiplier": draw(st.sampled_from([0.25, 0.5])),
    }


def llama4_text(draw: Draw) -> Config:
    return {
        **sizes(draw, own_size=True, num_layers=4),
        **flag(draw, "attention_bias", "use_qk_norm", "attn_temperature_tuning"),
        "num_local_experts": draw(st.integers(2, 6)),
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": draw(st.sampled_from([20, 36])),
        "interleave_moe_layer_step": draw(st.sampled_from([1, 2])),
        "no_rope_layer_interval": draw(st.sampled_from([2, 4])),
        "attention_chunk_size": draw(st.sampled_from([6, 16])),
        "floor_scale": 4,
        "attn_scale": 0.3,
    }


def phi(draw: Draw) -> Config:
    config = sizes(draw) | flag(draw, "qk_layernorm")
    config["rope_parameters"]["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    config["layer_norm_eps"] = config.pop("rms_norm_eps")
    return config


def glm4_moe(draw: Draw) -> Config:
    config = sizes(draw, own_size=True, num_layers=3) | groups(draw)
    config["rope_parameters"]["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    return config | flag(draw, "attention_bias", "use_qk_norm", "norm_topk_prob")


FAMILIES: dict[str, Callable[[Draw], Config]] = {
    function.__name__: function
    for function in (
        *(mixtral, mistral, ministral, llama, qwen2_moe, qwen3_moe, olmoe, flex_olmo, deepseek_v2),
        *(deepseek_v3, gpt_oss, phimoe, granitemoe, llama4_text, glm4_moe, phi),
    )
}
# Those that our own decoder knows, in some of their configs at least.
LEAN = ("llama", "ministral", "mixtral", "mistral", "qwen2_moe", "qwen3_moe", "olmoe")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 1000))
def test_a_random_model_gives_the_logits_of_transformers(family: str, data: st.DataObject, seed: int) -> None:
    config = FAMILIES[family](data.draw)
    dense_layers: DenseLayers = data.draw(st.sampled_from(["router", "experts"]))
    model = random_model(family, seed, **config)
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        decoders = ("auto", "hf") if family in LEAN else ("auto",)
        for decoder in decoders:
            router = lonely_router(Path(folder), dense_layers=dense_layers, decoder=decoder)
            check(router, model, prompts())


@pytest.mark.parametrize("family", sorted(generic.NAMES))
def test_a_family_that_keeps_its_gate_gives_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    config = SIZES | TINY[family]
    if "sliding_window" in CONFIG_MAPPING[family]().to_dict():
        config |= {"sliding_window": 5}
    model = random_model(family, 5, **config)
    write_model(model, tmp_path)
    check(lonely_router(tmp_path), model, prompts())


def prompts() -> list[list[int]]:
    return [
        torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in PROMPT_LENGTHS
    ]


def check(router: LocalRouter, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Prompts at once, in one step and in several, and each next token by itself."""
    for max_batch_tokens in (512, 11):
        logits, outputs = router.run(prompts, num_new=NUM_NEW, max_batch_tokens=max_batch_tokens)
        for prompt, rows, output in zip(prompts, logits, outputs, strict=True):
            expected = reference_logits(model, prompt + output)
            torch.testing.assert_close(rows, expected, atol=LOGITS_TOLERANCE, rtol=0)

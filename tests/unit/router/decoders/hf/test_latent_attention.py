"""Latent attention over the compressed cache against the modules of transformers over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.packed_batches import packed_batches
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.axk1 import modeling_axk1
from transformers.models.axk1.configuration_axk1 import AXK1Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite
from transformers.models.glm4_moe_lite.configuration_glm4_moe_lite import Glm4MoeLiteConfig
from transformers.models.minicpm3 import modeling_minicpm3
from transformers.models.minicpm3.configuration_minicpm3 import MiniCPM3Config
from transformers.models.mistral4 import modeling_mistral4
from transformers.models.mistral4.configuration_mistral4 import Mistral4Config
from transformers.models.youtu import modeling_youtu
from transformers.models.youtu.configuration_youtu import YoutuConfig

from moesaic.errors import Unsupported
from moesaic.families.model import LatentAttention, Mixer
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.hf import latent_attention
from router.decoders.hf.attention import AttentionStep
from router.decoders.hf.latent_attention import LatentAttentionModule
from router.phase_clock import PhaseClock
from router.scheduling.block_pool import BlockPool

HIDDEN, BLOCK_TOKENS = 32, 4
MIXER = LatentAttention(num_heads=4, latent_dim=24, rotary_dim=6, key_dim=8, value_dim=10)
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": MIXER.num_heads,
    "num_key_value_heads": MIXER.num_heads,
    "kv_lora_rank": MIXER.latent_dim,
    "qk_rope_head_dim": MIXER.rotary_dim,
    "qk_nope_head_dim": MIXER.key_dim,
    "v_head_dim": MIXER.value_dim,
    "q_lora_rank": 12,
    "max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}

V2 = (modeling_deepseek_v2.DeepseekV2Attention, modeling_deepseek_v2.DeepseekV2RotaryEmbedding)
V3 = (modeling_deepseek_v3.DeepseekV3Attention, modeling_deepseek_v3.DeepseekV3RotaryEmbedding)
AXK1 = (modeling_axk1.AXK1Attention, modeling_axk1.AXK1RotaryEmbedding)
GLM = (modeling_glm4_moe_lite.Glm4MoeLiteAttention, modeling_glm4_moe_lite.Glm4MoeLiteRotaryEmbedding)
MINICPM = (modeling_minicpm3.MiniCPM3Attention, modeling_minicpm3.MiniCPM3RotaryEmbedding)
MISTRAL4 = (modeling_mistral4.Mistral4Attention, modeling_mistral4.Mistral4RotaryEmbedding)
YOUTU = (modeling_youtu.YoutuAttention, modeling_youtu.YoutuRotaryEmbedding)

Modules = tuple[type[nn.Module], type[nn.Module]]
CASES: dict[str, tuple[Modules, PreTrainedConfig]] = {
    "v3": (V3, DeepseekV3Config(**SHAPE)),
    "v3 with pairs half apart": (V3, DeepseekV3Config(**SHAPE, rope_interleave=False)),
    "v3 without query compression": (V3, DeepseekV3Config(**SHAPE | {"q_lora_rank": None})),
    "v3 with biases": (V3, DeepseekV3Config(**SHAPE, attention_bias=True)),
    "v3 with yarn": (V3, DeepseekV3Config(**SHAPE, rope_parameters=YARN)),
    "v3 with short values": (V3, DeepseekV3Config(**SHAPE | {"v_head_dim": 4})),
    "v3 with long values": (V3, DeepseekV3Config(**SHAPE | {"v_head_dim": 20})),
    "v2": (V2, DeepseekV2Config(**SHAPE)),
    "v2 lite": (V2, DeepseekV2Config(**SHAPE | {"q_lora_rank": None}, rope_parameters=YARN)),
    "glm 4 lite": (GLM, Glm4MoeLiteConfig(**SHAPE)),
    "ax k1": (AXK1, AXK1Config(**SHAPE)),
    "youtu": (YOUTU, YoutuConfig(**SHAPE)),
    "minicpm 3": (MINICPM, MiniCPM3Config(**SHAPE)),
}
# Longer than a call has queries.
LENGTHS = {"short": 3, "one": 1, "long": 19, "longest": 150}


def random_module(modules: Modules, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    config._attn_implementation = "eager"
    module = modules[0](config, layer_idx=0).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(0.0, 0.3, generator=generator)
    return module


def mixer_of(config: Any) -> LatentAttention:
    return LatentAttention(
        MIXER.num_heads, MIXER.latent_dim, MIXER.rotary_dim, MIXER.key_dim, config.v_head_dim
    )


def whole_sequence(module: nn.Module, rotary: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[T, D] -> [T, D], by the module of transformers."""
    places = torch.arange(len(hidden))[None]
    mask = torch.full((1, 1, len(hidden), len(hidden)), -torch.inf, dtype=hidden.dtype).triu(1)
    output: torch.Tensor = module(
        hidden_states=hidden[None],
        position_embeddings=rotary(hidden[None], places),
        attention_mask=mask,
        past_key_values=None,
    )[0][0]
    return output


def paged(
    module: nn.Module, rotary: nn.Module, mixer: LatentAttention, hidden: dict[str, torch.Tensor], budget: int
) -> dict[str, torch.Tensor]:
    """Hidden states [T, D] of every sequence -> outputs [T, D], by ours."""
    dtype = hidden["one"].dtype
    cpu = torch.device("cpu")
    layout = AttentionLayout.of([mixer], block_tokens=BLOCK_TOKENS, device=cpu, dtype=dtype)
    cache = KVCache([mixer], num_blocks=64, block_tokens=BLOCK_TOKENS, dtype=dtype, device=cpu)
    ours = LatentAttentionModule(module, 0, mixer)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in hidden}
    mixers: tuple[Mixer, ...] = (mixer,)
    for batch in packed_batches(LENGTHS, layout, BlockPool(64, BLOCK_TOKENS), budget):
        rows = torch.cat([hidden[c.sequence.sequence_id][c.start : c.end] for c in batch.chunks])
        step = AttentionStep(batch, cache, mixers, PhaseClock())
        output, _ = ours(
            hidden_states=rows[None],
            position_embeddings=rotary(rows[None], batch.positions),
            attention_mask=None,
            position_ids=batch.positions,
            use_cache=False,
            step=step,
        )
        for chunk, first in zip(batch.chunks, batch.first_rows, strict=True):
            outputs[chunk.sequence.sequence_id].append(output[0, first : first + chunk.num_tokens])
    return {name: torch.cat(parts) for name, parts in outputs.items()}


def random_hidden(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(length + 4, HIDDEN, generator=generator).to(dtype)
        for name, length in LENGTHS.items()
    }


# In prompts of 7 tokens a step queries are absorbed, in those of 64 keys are expanded.
@pytest.mark.parametrize("budget", [7, 64, 512])
@pytest.mark.parametrize("case", CASES)
def test_prompts_in_chunks_and_decoded_tokens_equal_the_module_of_transformers(
    case: str, budget: int
) -> None:
    modules, config = CASES[case]
    module, rotary = random_module(modules, config, torch.float32), modules[1](config)
    hidden = random_hidden(torch.float32)
    outputs = paged(module, rotary, mixer_of(config), hidden, budget)
    for name, rows in hidden.items():
        torch.testing.assert_close(outputs[name], whole_sequence(module, rotary, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("case", ["v3 with yarn", "v2"])
def test_in_bfloat16_it_is_as_close_to_the_truth_as_the_module_of_transformers(
    case: str, budget: int
) -> None:
    modules, config = CASES[case]
    rotary, hidden = modules[1](config), random_hidden(torch.bfloat16)
    rounded = random_module(modules, config, torch.bfloat16)
    outputs = paged(rounded, rotary, mixer_of(config), hidden, budget)
    theirs = {name: whole_sequence(rounded, rotary, rows) for name, rows in hidden.items()}
    exact = rounded.float()
    for name, rows in hidden.items():
        truth = whole_sequence(exact, rotary, rows.float())
        error = (outputs[name] - truth).norm() / truth.norm()
        assert error < 1.5 * (theirs[name] - truth).norm() / truth.norm()
        assert error < 0.02


def test_heads_are_expanded_one_by_one_where_memory_has_no_room_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_heads, attend = [], latent_attention.attend_parts

    def count(queries: torch.Tensor, *rest: Any) -> None:
        num_heads.append(len(queries))
        attend(queries, *rest)

    monkeypatch.setattr(latent_attention, "attend_parts", count)
    monkeypatch.setattr(latent_attention, "_MOST_EXPANDED", 1)
    test_prompts_in_chunks_and_decoded_tokens_equal_the_module_of_transformers("v3", 64)
    assert set(num_heads) == {1}


def test_the_cache_holds_one_compressed_vector_a_token() -> None:
    large = LatentAttention(num_heads=128, latent_dim=512, rotary_dim=64, key_dim=128, value_dim=128)
    assert KVCache.token_bytes([large] * 61, torch.bfloat16) == 61 * 576 * 2


def test_parameters_keep_their_names_and_may_be_loaded_afterwards() -> None:
    modules, config = CASES["v3"]
    loaded = random_module(modules, config, torch.float32)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        ours = LatentAttentionModule(modules[0](config, layer_idx=0), 0, MIXER)
    ours.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    assert all(parameter.device.type == "cpu" for parameter in ours.parameters())


def test_a_module_that_computes_something_else_is_refused_by_name() -> None:
    config = Mistral4Config(**SHAPE)
    module = random_module(MISTRAL4, config, torch.float32)
    with pytest.raises(Unsupported, match="Mistral4Attention"):
        LatentAttentionModule(module, 0, MIXER)

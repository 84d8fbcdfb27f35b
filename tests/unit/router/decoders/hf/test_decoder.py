"""What the decoder on the modules of transformers refuses: rather by name at the start than wrong numbers later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_mixtral
from support.random_models import random_model, write_model
from support.tiny_families import SIZES, TINY
from torch import nn

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import CheckpointError, InvalidArgument, Unsupported
from moesaic.families import describe_model
from moesaic.families.model import Attention
from router.attention.views import AttentionLayout
from router.decoders.hf.attention import AttentionStep, Temperature, paged_attention
from router.decoders.hf.config import modules_config
from router.decoders.hf.decoder import HfDecoder
from router.phase_clock import PhaseClock


def change_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> HfDecoder:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    layout = AttentionLayout.of(model.mixers, block_tokens=16, device=torch.device("cpu"), dtype=dtype)
    return HfDecoder(checkpoint, model, layout, num_positions=64, clock=PhaseClock())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"sliding_window": 7}, "sliding_window"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
    ],
)
def test_an_attention_that_wants_what_is_not_known_is_refused_by_name(
    arguments: dict[str, Any], name: str
) -> None:
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    mixers = (Attention(2, 2, 4, window=5),)
    step = AttentionStep(cast(Any, None), cast(Any, None), mixers, PhaseClock())
    rows = torch.zeros(1, 2, 3, 4)
    with pytest.raises(Unsupported, match=name):
        paged_attention(module, rows, rows, rows, None, scaling=1.0, step=step, **arguments)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("initializer_range", "wide", "initializer_range"),
        ("dtype", "x", "has no attribute"),
        ("pad_token_id", 10**6, "AssertionError"),
        ("rope_parameters", {"rope_type": "none", "rope_theta": 1e4}, "KeyError"),
    ],
)
def test_a_config_that_transformers_refuses_is_a_bad_checkpoint(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    folder = change_config(write_mixtral(tmp_path), **{key: value})
    with pytest.raises(CheckpointError, match=message) as refused:
        load(folder)
    assert refused.value.field == "config.json"


def test_positions_that_change_with_the_longest_neighbour_are_served_up_to_there_only(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    checkpoint = open_checkpoint(
        change_config(write_mixtral(tmp_path, head_dim=8), rope_parameters=parameters)
    )
    model = describe_model(checkpoint)
    modules_config(checkpoint, model, 32)
    with pytest.raises(InvalidArgument, match="beyond 32 tokens") as refused:
        modules_config(checkpoint, model, 33)
    assert refused.value.field == "max_model_len"


def test_what_a_family_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    inner = {
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_hidden_layers": 2,
    }
    config = {**sizes, **inner, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "pad_token_id": 0}
    decoder = load(write_model(random_model("glm4_moe", 0, **config), tmp_path), torch.bfloat16)
    dtypes = {
        name.rpartition(".")[2]: tensor.dtype
        for name, tensor in decoder._modules.named_parameters()
        if "mlp.gate." in name
    }
    assert dtypes == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


@pytest.mark.parametrize(
    ("family", "ending"),
    # Declared so by the module; listed by the family, in the list that counts for bfloat16 and in the one that does not.
    [("hunyuan_v1_moe", "gate.wg.weight"), ("ernie4_5_moe", "gate.weight"), ("afmoe", "expert_bias")],
)
def test_what_a_family_keeps_in_float32_is_not_rounded(tmp_path: Path, family: str, ending: str) -> None:
    model = random_model(family, 0, **(SIZES | TINY[family]))
    decoder = load(write_model(model, tmp_path), torch.bfloat16)
    loaded = decoder._modules.state_dict()
    exact = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(ending)}
    assert exact
    for name, tensor in exact.items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_code_reference_in_a_config_is_never_followed(tmp_path: Path) -> None:
    folder = change_config(write_mixtral(tmp_path), auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('run')")
    load(folder)


def test_queries_grow_with_the_position_of_their_token_not_with_its_place_in_the_batch() -> None:
    positions = torch.tensor([0, 3, 11, 2])
    growth = Temperature(scale=0.5, floor=4.0).of(positions)
    expected = [1.0, 1 + 0.5 * torch.log(torch.tensor(2.0)), 1 + 0.5 * torch.log(torch.tensor(4.0)), 1.0]
    torch.testing.assert_close(growth, torch.tensor(expected))


def test_a_tensor_whose_module_has_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(random_model("minimax_m2", 0, **SIZES | TINY["minimax_m2"]), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shape \[8\], its module has \[32\]") as refused:
        load(folder)
    assert refused.value.field == "model.norm.weight"

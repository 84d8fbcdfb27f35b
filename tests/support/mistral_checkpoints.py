"""Models of transformers written as Mistral released its own: other names, rotary rows interleaved, params.json.

`safetensors`: consolidated.safetensors. `torrent`: consolidated.00.pth, the same names. `stacked`: several
consolidated.NN.pt, all experts of a layer in one tensor, w2 transposed.
"""

# Shapes: H heads, d head size, E slots, F inner size, D hidden size.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

Form = Literal["safetensors", "torrent", "stacked"]

NUM_STACKED_FILES = 3


def write_mistral_format(folder: Path, model: PreTrainedModel, form: Form, **params: Any) -> Path:
    """A Mixtral or a Mistral; `params` override those of the model, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = mistral_tensors(model, stacked=form == "stacked")
    if form == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    elif form == "torrent":
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        for part in range(NUM_STACKED_FILES):
            names = list(tensors)[part::NUM_STACKED_FILES]
            torch.save({name: tensors[name] for name in names}, folder / f"consolidated.{part:02}.pt")
    given = (_stacked_params if form == "stacked" else mistral_params)(model) | params
    text = json.dumps({key: value for key, value in given.items() if value is not None})
    (folder / "params.json").write_text(text)
    return folder


def mistral_params(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": config.sliding_window,
    }
    if config.model_type == "mixtral":
        params["moe"] = {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }
    return params


def _stacked_params(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }


def mistral_tensors(model: PreTrainedModel, *, stacked: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter under the name that it has in Mistral's format."""
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {
        "tok_embeddings.weight": ours["model.embed_tokens.weight"],
        "norm.weight": ours["model.norm.weight"],
        "output.weight": ours["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        prefix, target = f"model.layers.{layer}.", f"layers.{layer}."
        tensors |= _attention(model, ours, prefix, target)
        tensors[target + "attention_norm.weight"] = ours[prefix + "input_layernorm.weight"]
        tensors[target + "ffn_norm.weight"] = ours[prefix + "post_attention_layernorm.weight"]
        if model.config.model_type == "mixtral":
            tensors |= (_stacked_experts if stacked else _experts)(ours, prefix, target)
        else:
            for name, short in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                tensors[f"{target}feed_forward.{short}.weight"] = ours[f"{prefix}mlp.{name}.weight"]
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _attention(
    model: PreTrainedModel, ours: dict[str, torch.Tensor], prefix: str, target: str
) -> dict[str, torch.Tensor]:
    config = model.config
    projections = {name: ours[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo"}
    projections["q"] = _interleaved(projections["q"], config.num_attention_heads)
    projections["k"] = _interleaved(projections["k"], config.num_key_value_heads)
    return {f"{target}attention.w{name}.weight": tensor for name, tensor in projections.items()}


def _interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[H * d, D] with rows i and d/2 + i of every head made neighbours."""
    heads = rows.view(num_heads, 2, -1, rows.shape[-1])
    return heads.transpose(1, 2).reshape(rows.shape)


def _experts(ours: dict[str, torch.Tensor], prefix: str, target: str) -> dict[str, torch.Tensor]:
    gate_up, down = ours[prefix + "mlp.experts.gate_up_proj"], ours[prefix + "mlp.experts.down_proj"]
    tensors = {target + "feed_forward.gate.weight": ours[prefix + "mlp.gate.weight"]}
    for slot in range(len(down)):
        gate, up = gate_up[slot].chunk(2)
        for name, tensor in (("w1", gate), ("w2", down[slot]), ("w3", up)):
            tensors[f"{target}feed_forward.experts.{slot}.{name}.weight"] = tensor
    return tensors


def _stacked_experts(ours: dict[str, torch.Tensor], prefix: str, target: str) -> dict[str, torch.Tensor]:
    gate_up, down = ours[prefix + "mlp.experts.gate_up_proj"], ours[prefix + "mlp.experts.down_proj"]
    gate, up = gate_up.chunk(2, dim=1)
    block = target + "block_sparse_moe."
    return {
        block + "gate.weight": ours[prefix + "mlp.gate.weight"],
        block + "w1": gate.flatten(0, 1),
        block + "w2": down.transpose(1, 2).flatten(0, 1),
        block + "w3": up.flatten(0, 1),
    }


def randomise(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Every parameter another random number, the norms included, so that no two could be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()

"""Tiny random StripedHyena checkpoints, and what they mean: a reference that goes token by token in double precision.

The reference shares nothing with the router: no FFT, no complex numbers, no packing, no cache.
"""

# Shapes: D hidden size, H query heads, G key/value heads, d head size, S modes, K taps of the short filter, T tokens.

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

TINY: dict[str, Any] = {
    "model_type": "stripedhyena",
    "architectures": ["StripedHyenaModelForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 4,
    "attn_layer_idxs": [1, 3],
    # The published file names a layer beyond the last, too.
    "hyena_layer_idxs": [0, 2, 4],
    "num_attention_heads": 4,
    "proj_groups": 2,
    "hyena_filter_groups": 1,
    "num_filters": 32,
    "state_size": 2,
    "short_filter_length": 3,
    "short_filter_bias": True,
    "inner_mlp_size": 40,
    "eps": 1e-5,
    "rotary_emb_base": 500000,
    "max_seqlen": 256,
    "use_flash_rmsnorm": True,
    "column_split_hyena": True,
    "tie_embeddings": False,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": False,
    "prefill_style": "fft",
}

# What Evo-1 has otherwise; without a size of the MLP it follows from that of the model.
EVO: dict[str, Any] = {
    "proj_groups": 1,
    "state_size": 8,
    "inner_mlp_size": None,
    "inner_size_multiple_of": 16,
    "eps": 1e-3,
    "rotary_emb_base": 10000,
    "use_interpolated_rotary_pos_emb": True,
    "rotary_emb_scaling_factor": 16,
    "use_flash_rmsnorm": False,
    "tie_embeddings": True,
    "qkv_proj_bias": True,
    "mha_out_proj_bias": True,
    "mlp_activation": "gelu",
}


def write_striped_hyena(
    folder: Path,
    *,
    prefix: str = "backbone.",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Writes config.json and the weights under the names of the Hub's files, or with no prefix under those of the
    standalone ones. Poles and residues are float32 whatever `dtype`. Returns `folder`."""
    config = TINY | config_overrides
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        prefix + name: tensor if name.endswith(("poles", "residues")) else tensor.to(dtype)
        for name, tensor in _random(config, seed).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _random(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(rows: int, columns: int) -> Tensor:
        return noise(rows, columns) / math.sqrt(columns)

    size, vocab = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    tensors = {"embedding_layer.weight": noise(vocab, size), "norm.scale": 1 + 0.1 * noise(size)}
    if not config["tie_embeddings"]:
        tensors["unembed.weight"] = matrix(vocab, size)
    for layer in range(config["num_layers"]):
        block = f"blocks.{layer}."
        for name in ("pre_norm", "post_norm"):
            tensors[f"{block}{name}.scale"] = 1 + 0.1 * noise(size)
        inner = inner_size(config)
        for name, shape in (("l1", (inner, size)), ("l2", (inner, size)), ("l3", (size, inner))):
            tensors[f"{block}mlp.{name}.weight"] = matrix(*shape)
        if layer in config["attn_layer_idxs"]:
            rows = size + 2 * size // config["proj_groups"]
            for name, bias, num_rows in (
                ("Wqkv", "qkv_proj_bias", rows),
                ("out_proj", "mha_out_proj_bias", size),
            ):
                tensors[f"{block}inner_mha_cls.{name}.weight"] = matrix(num_rows, size)
                if config[bias]:
                    tensors[f"{block}inner_mha_cls.{name}.bias"] = 0.1 * noise(num_rows)
            tensors[f"{block}inner_mha_cls.rotary_emb.inv_freq"] = noise(size // heads // 2)
            continue
        for name, rows in (("projections", 3 * size), ("out_filter_dense", size)):
            tensors[f"{block}{name}.weight"] = matrix(rows, size)
            tensors[f"{block}{name}.bias"] = 0.1 * noise(rows)
        taps, modes = config["short_filter_length"], config["state_size"]
        tensors[f"{block}filter.short_filter_weight"] = noise(3 * size, 1, taps) / math.sqrt(taps)
        if config["short_filter_bias"]:
            tensors[f"{block}filter.short_filter_bias"] = 0.1 * noise(3 * size)
        tensors[f"{block}filter.D"] = 0.3 * noise(size)
        radius, angle = torch.rand(2, size, modes, 1, generator=generator)
        poles = torch.polar(0.98 * radius.sqrt(), 2 * math.pi * angle)
        tensors[f"{block}filter.poles"] = torch.view_as_real(poles)
        tensors[f"{block}filter.residues"] = noise(size, modes, 1, 2) / (2 * math.sqrt(modes))
    return tensors


def inner_size(config: dict[str, Any]) -> int:
    if config.get("inner_mlp_size"):
        return int(config["inner_mlp_size"])
    multiple = config.get("inner_size_multiple_of", 64)
    return int(math.ceil(int(8 * config["hidden_size"] / 3) / multiple) * multiple)


class Reference:
    """The model of a checkpoint folder, in double precision."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors = {
            name.removeprefix("backbone."): tensor.double()
            for name, tensor in load_file(folder / "model.safetensors").items()
        }

    def logits(self, tokens: list[int]) -> Tensor:
        """[T, V] of one sequence."""
        hidden = self._tensors["embedding_layer.weight"][tokens]
        for layer in range(self.config["num_layers"]):
            block = {
                name.removeprefix(f"blocks.{layer}."): tensor
                for name, tensor in self._tensors.items()
                if name.startswith(f"blocks.{layer}.")
            }
            mix = self._attend if layer in self.config["attn_layer_idxs"] else self._convolve
            hidden = hidden + mix(self._normed(hidden, block["pre_norm.scale"]), block)
            hidden = hidden + self._mlp(self._normed(hidden, block["post_norm.scale"]), block)
        head = "embedding_layer.weight" if self.config["tie_embeddings"] else "unembed.weight"
        return self._normed(hidden, self._tensors["norm.scale"]) @ self._tensors[head].T

    def generate(self, prompt: list[int], num_new: int) -> list[int]:
        """Greedy tokens, each from the whole sequence."""
        tokens = list(prompt)
        for _ in range(num_new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _normed(self, rows: Tensor, scale: Tensor) -> Tensor:
        mean, eps = (rows**2).mean(1, keepdim=True), self.config["eps"]
        below = torch.sqrt(mean + eps) if self.config["use_flash_rmsnorm"] else torch.sqrt(mean) + eps
        return rows / below * scale

    def _mlp(self, rows: Tensor, block: dict[str, Tensor]) -> Tensor:
        act = functional.gelu if self.config.get("mlp_activation") == "gelu" else functional.silu
        inner = act(rows @ block["mlp.l1.weight"].T) * (rows @ block["mlp.l2.weight"].T)
        return inner @ block["mlp.l3.weight"].T

    def _attend(self, rows: Tensor, block: dict[str, Tensor]) -> Tensor:
        num_tokens, size = rows.shape
        heads = self.config["num_attention_heads"]
        groups, dim = self.config["proj_groups"], size // heads
        qkv = rows @ block["inner_mha_cls.Wqkv.weight"].T + block.get("inner_mha_cls.Wqkv.bias", 0)
        queries = self._turned(qkv[:, :size].view(num_tokens, heads, dim))
        keys, values = qkv[:, size:].view(num_tokens, 2, heads // groups, dim).unbind(1)
        keys = self._turned(keys)
        output = torch.zeros_like(queries)
        for head in range(heads):
            for place in range(num_tokens):
                scores = keys[: place + 1, head // groups] @ queries[place, head] / math.sqrt(dim)
                output[place, head] = scores.softmax(0) @ values[: place + 1, head // groups]
        flat = output.flatten(1)
        return flat @ block["inner_mha_cls.out_proj.weight"].T + block.get("inner_mha_cls.out_proj.bias", 0)

    def _turned(self, heads: Tensor) -> Tensor:
        """[T, h, d]: pairs are half a head apart."""
        half = heads.shape[2] // 2
        scaling = (
            self.config["rotary_emb_scaling_factor"]
            if self.config.get("use_interpolated_rotary_pos_emb")
            else 1
        )
        turned = torch.empty_like(heads)
        for place in range(len(heads)):
            for pair in range(half):
                angle = place / scaling / self.config["rotary_emb_base"] ** (pair / half)
                first, second = heads[place, :, pair], heads[place, :, half + pair]
                turned[place, :, pair] = first * math.cos(angle) - second * math.sin(angle)
                turned[place, :, half + pair] = second * math.cos(angle) + first * math.sin(angle)
        return turned

    def _convolve(self, rows: Tensor, block: dict[str, Tensor]) -> Tensor:
        size, heads, taps = (
            rows.shape[1],
            self.config["num_attention_heads"],
            self.config["short_filter_length"],
        )
        weight, bias = block["filter.short_filter_weight"][:, 0], block.get("filter.short_filter_bias", 0)
        poles, residues = block["filter.poles"][:, :, 0], block["filter.residues"][:, :, 0]  # [D, S, 2]
        past = [torch.zeros(3 * size, dtype=torch.float64)] * (taps - 1)
        real, imaginary = torch.zeros(2, size, self.config["state_size"], dtype=torch.float64)
        outputs = []
        for row in rows @ block["projections.weight"].T + block["projections.bias"]:
            past = [*past, row][-taps:]
            short = sum((weight[:, tap] * past[tap] for tap in range(taps)), torch.zeros(3 * size)) + bias
            if self.config["column_split_hyena"]:
                x2, x1, v = (part.flatten() for part in short.view(heads, 3, size // heads).unbind(1))
            else:
                x2, x1, v = short.view(3, size)
            inner = x1 * v
            real, imaginary = (
                poles[..., 0] * real - poles[..., 1] * imaginary + inner[:, None],
                poles[..., 0] * imaginary + poles[..., 1] * real,
            )
            long = (residues[..., 0] * real - residues[..., 1] * imaginary).sum(1)
            outputs.append(x2 * (long + block["filter.D"] * inner))
        return torch.stack(outputs) @ block["out_filter_dense.weight"].T + block["out_filter_dense.bias"]

"""Tiny random encoder-decoders, written as published checkpoints lie, and references for what comes out of them.

Of Switch the reference is transformers. Its NLLB-MoE runs the wrong experts, and it has no ST-MoE: these are computed
here from the tensors, token by token and slot by slot, without a cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

VOCAB = 64
# logits [T, E] of tokens that are routed together -> combine weights [T, E], zero where nobody is asked.
Routing = Callable[[Tensor], Tensor]


def write_switch(
    folder: Path, seed: int, *, extra: dict[str, Any] | None = None, **config: Any
) -> PreTrainedModel:
    """`extra`: keys of the config that transformers does not know."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 20,
        "num_heads": 3,
        "num_experts": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
    }
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**(sizes | config)))
    return _written(model, folder, seed, extra or {})


def write_nllb(folder: Path, seed: int, **config: Any) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 24,
        "max_position_embeddings": 64,
        "num_experts": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 28,
    }
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**(sizes | config)))
    _written(model, folder, seed, {})


def greedy(
    logits: Callable[[Sequence[int], Sequence[int]], Tensor], prompt: Sequence[int], num_new: int, start: int
) -> tuple[Tensor, list[int]]:
    """`logits` of a prompt and decoder inputs -> the logits [num_new, V] that greedy tokens come from, and these."""
    answer = [start]
    rows = []
    for _ in range(num_new):
        rows.append(logits(prompt, answer)[-1])
        answer.append(int(rows[-1].argmax()))
    return torch.stack(rows), answer[1:]


def switch_logits(model: PreTrainedModel) -> Callable[[Sequence[int], Sequence[int]], Tensor]:
    @torch.inference_mode()
    def logits(prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        encoded = model.get_encoder()(input_ids=torch.tensor([list(prompt)]))
        # One by one through its cache: each token is counted by itself where slots can be full.
        past, rows = None, []
        for token in answer:
            output = model(
                encoder_outputs=encoded,
                decoder_input_ids=torch.tensor([[token]]),
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            rows.append(output.logits[0, -1])
        return torch.stack(rows)

    return logits


class RoutedMlp(nn.Module):
    """In the place of a sparse MLP of transformers: every slot by itself, with weights that `routing` says."""

    def __init__(self, mlp: Any, routing: Routing) -> None:
        super().__init__()
        self.router, self.experts = mlp.router, mlp.experts
        self._routing = routing

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        weights = self._routing(F.linear(rows, self.router.classifier.weight))
        output = sum(
            weights[:, slot, None] * self.experts[f"expert_{slot}"](rows) for slot in range(weights.shape[1])
        )
        return output.view(hidden.shape)  # type: ignore[union-attr]


def route_by(model: Any, routing: Routing) -> None:
    """Gives every sparse layer of a Switch model another routing."""
    for side in (model.encoder, model.decoder):
        for block in side.block:
            layer = block.layer[-1]
            if layer.is_sparse:
                layer.mlp = RoutedMlp(layer.mlp, routing)


class NllbReference:
    """NLLB-MoE by its published rule, from the tensors of a checkpoint."""

    def __init__(
        self, folder: Path, routing: Callable[[Tensor, dict[str, Any]], Tensor] | None = None
    ) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self._tensors = load_file(folder / "model.safetensors")
        self._routing = routing or _dropless
        self._scale = math.sqrt(self.config["d_model"]) if self.config["scale_embedding"] else 1.0

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        encoded = self.encode(prompt)
        hidden = self._embed(answer)
        causal = torch.full((len(answer), len(answer)), -math.inf).triu(1)
        for layer in range(self.config["decoder_layers"]):
            prefix, heads = f"model.decoder.layers.{layer}.", self.config["decoder_attention_heads"]
            normed = self._norm(prefix + "self_attn_layer_norm", hidden)
            hidden = hidden + self._attend(prefix + "self_attn.", normed, normed, heads, causal)
            normed = self._norm(prefix + "cross_attention_layer_norm", hidden)
            hidden = hidden + self._attend(prefix + "cross_attention.", normed, encoded, heads)
            # Each token by itself: what is routed in one step of a decoder.
            normed = self._norm(prefix + "ff_layer_norm", hidden)
            mixed = [self._mlp(prefix + "ffn.", row, layer, "decoder") for row in normed.split(1)]
            hidden = hidden + torch.cat(mixed)
        head = self._tensors.get("lm_head.weight", self._tensors["model.shared.weight"])
        return F.linear(self._norm("model.decoder.layer_norm", hidden), head)

    def encode(self, prompt: Sequence[int]) -> Tensor:
        hidden = self._embed(prompt)
        for layer in range(self.config["encoder_layers"]):
            prefix, heads = f"model.encoder.layers.{layer}.", self.config["encoder_attention_heads"]
            normed = self._norm(prefix + "self_attn_layer_norm", hidden)
            hidden = hidden + self._attend(prefix + "self_attn.", normed, normed, heads)
            normed = self._norm(prefix + "ff_layer_norm", hidden)
            hidden = hidden + self._mlp(prefix + "ffn.", normed, layer, "encoder")
        return self._norm("model.encoder.layer_norm", hidden)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        size, padding = self.config["d_model"], self.config["pad_token_id"]
        rows, place = [], padding
        for token in tokens:
            row = self._tensors["model.shared.weight"][token] * self._scale
            if token != padding:
                place += 1
                step = math.log(10000) / (size // 2 - 1)
                angles = torch.tensor([place * math.exp(-step * i) for i in range(size // 2)])
                row = row + torch.cat([angles.sin(), angles.cos()])
            rows.append(row)
        return torch.stack(rows)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _attend(
        self, prefix: str, rows: Tensor, sources: Tensor, num_heads: int, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = (
            self._linear(prefix + name, of).unflatten(1, (num_heads, -1)).transpose(0, 1)
            for name, of in (("q_proj", rows), ("k_proj", sources), ("v_proj", sources))
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        shares = (scores if mask is None else scores + mask).softmax(-1)
        return self._linear(prefix + "out_proj", (shares @ v).transpose(0, 1).flatten(1))

    def _mlp(self, prefix: str, rows: Tensor, layer: int, side: str) -> Tensor:
        if (layer + 1) % self.config[f"{side}_sparse_step"]:
            return self._linear(prefix + "fc2", self._linear(prefix + "fc1", rows).relu())
        weights = self._routing(self._linear(prefix + "router.classifier", rows), self.config)
        output = torch.zeros_like(rows)
        for slot in range(weights.shape[1]):
            expert = f"{prefix}experts.expert_{slot}."
            inner = self._linear(expert + "fc1", rows).relu()
            output += weights[:, slot, None] * self._linear(expert + "fc2", inner)
        return output * (1 - self.config["moe_token_dropout"])


def _dropless(logits: Tensor, config: dict[str, Any]) -> Tensor:
    weights = torch.zeros_like(logits)
    for row, scores in zip(weights, logits.softmax(-1), strict=True):
        first, second = scores.topk(2).indices.tolist()
        for slot in (first, second):
            row[slot] = scores[slot] / (scores[first] + scores[second])
    return weights


def _written(model: Any, folder: Path, seed: int, extra: dict[str, Any]) -> PreTrainedModel:
    """With fan-in scaled weights, so that gates are seldom near ties."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1:
                tensor.copy_(0.1 * noise + (1 if name.endswith("norm.weight") else 0))
            elif "shared" in name or "embed_tokens" in name or "relative" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * (2 if "router" in name else 1) / math.sqrt(tensor.shape[-1]))
    model.eval().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | extra
    (folder / "config.json").write_text(json.dumps(config))
    written: PreTrainedModel = model
    return written

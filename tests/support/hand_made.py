"""Models of transformers whose experts are changed by hand: what epochs and policies must be equal to.

Shapes: D hidden size, F inner size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True, eq=False)
class HandMadeExpert:
    """A gated expert with SiLU, and what scores it."""

    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]
    row: Tensor  # [D]

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.gate)) * F.linear(rows, self.up), self.down)

    @classmethod
    @torch.no_grad()
    def random(cls, model: Any, layer: int, seed: int) -> HandMadeExpert:
        """One whose outputs and scores are as large as those of the layer's own experts."""
        block = model.model.layers[layer].mlp
        generator = torch.Generator().manual_seed(100 * seed + layer)

        def like(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, generator=generator) * tensor.std()

        gate, up = block.experts.gate_up_proj[0].chunk(2)
        down, row = block.experts.down_proj[0], block.gate.weight
        return cls(like(gate), like(up), like(down), like(row)[0])


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


@torch.no_grad()
def without_slots(model: Any, slots: Sequence[int]) -> Any:
    """Takes one slot out of every layer."""
    for layer, slot in zip(model.model.layers, slots, strict=True):
        kept = [index for index in range(len(layer.mlp.gate.weight)) if index != slot]
        _put(layer.mlp, lambda tensor, kept=kept: tensor[kept])
    return model


@torch.no_grad()
def with_added(model: Any, experts: Iterable[HandMadeExpert]) -> Any:
    """Puts one slot more into every layer."""
    for layer, expert in zip(model.model.layers, experts, strict=True):
        block, gate_up = layer.mlp, torch.cat((expert.gate, expert.up))
        block.gate.weight = _parameter(torch.cat((block.gate.weight, expert.row[None])))
        block.experts.gate_up_proj = _parameter(torch.cat((block.experts.gate_up_proj, gate_up[None])))
        block.experts.down_proj = _parameter(torch.cat((block.experts.down_proj, expert.down[None])))
        _count(block)
    return model


@torch.no_grad()
def with_swapped(model: Any, layer: int, slot: int, expert: HandMadeExpert, *, row: bool = False) -> Any:
    """Puts another expert into a slot; with `row` what scores it, too."""
    block = model.model.layers[layer].mlp
    block.experts.gate_up_proj[slot] = torch.cat((expert.gate, expert.up))
    block.experts.down_proj[slot] = expert.down
    if row:
        block.gate.weight[slot] = expert.row
    return model


def save(model: Any, folder: Path) -> Path:
    """As a folder that says how many experts it has."""
    count = len(model.model.layers[0].mlp.gate.weight)
    for key in ("num_local_experts", "num_experts"):
        if key in model.config.to_dict():
            setattr(model.config, key, count)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], num_new: int) -> tuple[list[int], Tensor]:
    """The next tokens, and the log probabilities [T + num_new - 1] of all tokens after the first."""
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return tokens[len(prompt) :], logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@torch.inference_mode()
def rows_just_below(model: Any, tokens: Sequence[int], top_k: int) -> list[Tensor]:
    """For every layer a row of its gate [D] that scores each of these tokens, fewer than D, three below the last slot that it
    chooses."""
    rows: list[Tensor] = []

    def solve(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden, weight = inputs[0].reshape(-1, inputs[0].shape[-1]), gate.get_parameter("weight")
        last = F.linear(hidden, weight).topk(top_k).values[:, -1] - 3
        rows.append(torch.linalg.lstsq(hidden.double(), last[:, None].double()).solution[:, 0].float())

    hooks = [layer.mlp.gate.register_forward_pre_hook(solve) for layer in model.model.layers]
    model(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return rows


def _put(block: Any, change: Any) -> None:
    block.gate.weight = _parameter(change(block.gate.weight))
    block.experts.gate_up_proj = _parameter(change(block.experts.gate_up_proj))
    block.experts.down_proj = _parameter(change(block.experts.down_proj))
    _count(block)


def _count(block: Any) -> None:
    block.gate.num_experts = block.experts.num_experts = len(block.gate.weight)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)

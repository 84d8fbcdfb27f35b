"""Bundles of the demo model's experts with noise on them, and the model of transformers into which they are put by hand.

Shapes: D hidden size, F inner size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.bundles import (
    Bundle,
    BundleExpert,
    BundleGateRow,
    Manifest,
    ProbeVectors,
    TensorSource,
    write_bundle,
)
from moesaic.bundles.version import mlp_parameters
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families import describe_model

# Of the standard deviation of a tensor: enough for another text.
_NOISE = 1.0
_NUM_PROBES = 4


@dataclass(frozen=True, slots=True, eq=False)
class NoisyExpert:
    """An expert of a layer with noise on it. `slot`: the one that it replaces; None: a new one."""

    layer: int
    slot: int | None
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]
    row: Tensor  # [D]

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.gate)) * F.linear(rows, self.up), self.down)


@dataclass(frozen=True, slots=True)
class NoisyBundle:
    """A bundle, and its experts as they are put in by hand: one in every layer."""

    bundle: Bundle
    experts: tuple[NoisyExpert, ...]

    @property
    def name(self) -> str:
        return self.bundle.manifest.name


def load_reference(folder: Path, bundles: Iterable[NoisyBundle] = ()) -> Any:
    """The model of a folder in transformers, float32, with the experts of the bundles in it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for bundle in bundles:
        for expert in bundle.experts:
            _put(model.model.layers[expert.layer].mlp, expert)
    return model


def write_noisy_bundle(folder: Path, base: Path, like: int, *, new: bool, seed: int) -> NoisyBundle:
    """In every layer an expert made of slot `like`, for that slot or for a new one. Its name is the folder's."""
    reference = load_reference(base)
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor + torch.randn(tensor.shape, generator=generator) * (_NOISE * tensor.std())

    experts = []
    for layer, block in enumerate(reference.model.layers):
        gate, up = block.mlp.experts.gate_up_proj[like].chunk(2)
        down, row = block.mlp.experts.down_proj[like], block.mlp.gate.weight[like]
        weights = (noisy(gate), noisy(up), noisy(down), noisy(row))
        experts.append(NoisyExpert(layer, None if new else like, *weights))
    probes = torch.randn(_NUM_PROBES, reference.config.hidden_size, generator=generator)
    return NoisyBundle(_write(folder, base, experts, probes), tuple(experts))


@torch.inference_mode()
def distance_from_greedy(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """By how much the logit of any token of an answer lies below the greatest one; 0: the model chooses all of them."""
    logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(-1).values - chosen).max())


@torch.no_grad()
def _put(block: Any, expert: NoisyExpert) -> None:
    gate_up = torch.cat((expert.gate, expert.up))
    if expert.slot is not None:
        block.experts.gate_up_proj[expert.slot] = gate_up
        block.experts.down_proj[expert.slot] = expert.down
        return
    block.gate.weight = _extended(block.gate.weight, expert.row)
    block.experts.gate_up_proj = _extended(block.experts.gate_up_proj, gate_up)
    block.experts.down_proj = _extended(block.experts.down_proj, expert.down)
    block.gate.num_experts = block.experts.num_experts = len(block.gate.weight)


def _extended(stack: Tensor, one: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat((stack, one[None])), requires_grad=False)


def _write(folder: Path, base: Path, experts: Iterable[NoisyExpert], probes: Tensor) -> Bundle:
    checkpoint = open_checkpoint(base)
    shape = describe_model(checkpoint)
    tensors, listed = {"probe_inputs": _source(probes)}, []
    for expert in experts:
        prefix = f"{expert.layer}."
        parts = {"gate": expert.gate, "up": expert.up, "down": expert.down, "probe_outputs": expert(probes)}
        if expert.slot is None:
            parts["gate_row"] = expert.row
        tensors |= {prefix + name: _source(values) for name, values in parts.items()}
        module = shape.experts[expert.layer].module
        listed.append(
            BundleExpert(
                expert.layer,
                expert.slot,
                "mlp",
                mlp_parameters(module),
                "",
                {name: prefix + name for name in module.weights},
                None if expert.slot is not None else BundleGateRow(prefix + "gate_row"),
                ProbeVectors("probe_inputs", prefix + "probe_outputs"),
            )
        )
    manifest = Manifest(
        name=folder.name,
        base_model=base.name,
        base_fingerprint=FolderIdentity.of(checkpoint).fingerprint.hex(),
        hidden_size=shape.hidden_size,
        experts=tuple(listed),
        tensors={},
    )
    return write_bundle(folder, manifest, tensors)


def _source(values: Tensor) -> TensorSource:
    return TensorSource.of(values.contiguous().numpy())

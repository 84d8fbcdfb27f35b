"""Tiny expert bundles for tests, made of random weights or of given ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

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
from moesaic.families.model import ExpertModule

# (layer, slot), where the slot of a new one is None.
Target = tuple[int, int | None]
Weights = Mapping[str, np.ndarray]


def random_weights(module: ExpertModule, seed: int) -> dict[str, np.ndarray]:
    """float32, fan-in scaled, by the module's names."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(module.shape(name)) / np.sqrt(module.shape(name)[-1])).astype("f4")
        for name in module.weights
    }


def compute(module: ExpertModule, weights: Weights, rows: np.ndarray) -> np.ndarray:
    """What a gated silu expert without biases answers, [n, D] -> [n, D] float32."""
    assert (module.activation, module.gated, module.biased) == ("silu", True, False)
    gate, up, down = (torch.from_numpy(np.asarray(weights[name])) for name in ("gate", "up", "down"))
    x = torch.from_numpy(rows)
    return ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T).numpy()


def make_bundle(
    folder: Path,
    base: Path,
    targets: Iterable[Target] = ((0, None),),
    *,
    name: str = "maths-v1",
    seed: int = 0,
    tags: Sequence[str] = (),
    weights: Mapping[Target, Weights] | None = None,
    gate_rows: bool | Mapping[Target, np.ndarray] | None = None,
    **manifest: Any,
) -> Bundle:
    """A valid bundle for the model folder `base`, whose experts are of kind mlp in float32.

    Without `weights` they are random, another seed makes another version. `gate_rows`: rows for the targets, or
    whether they have random ones; by default new slots have.
    """
    checkpoint = open_checkpoint(base)
    model = describe_model(checkpoint)
    tensors: dict[str, TensorSource] = {}
    experts = []
    for index, target in enumerate(targets):
        layer, slot = target
        module = model.experts[layer].module
        own = (weights or {}).get(target) or random_weights(module, 1000 * seed + index)
        prefix = f"{layer}.{'new' if slot is None else slot}.{index}."
        random = np.random.default_rng(1000 * seed + index + 500)
        inputs = random.standard_normal((4, model.hidden_size)).astype("f4")
        parts = {**own, "probe_in": inputs, "probe_out": compute(module, own, inputs)}
        row = _row(gate_rows, target, random, model.hidden_size)
        if row is not None:
            parts["gate_row"] = row
        tensors |= {prefix + part: TensorSource.of(values) for part, values in parts.items()}
        experts.append(
            BundleExpert(
                layer,
                slot,
                "mlp",
                mlp_parameters(module),
                "",
                {weight: prefix + weight for weight in module.weights},
                None if row is None else BundleGateRow(prefix + "gate_row"),
                ProbeVectors(prefix + "probe_in", prefix + "probe_out"),
            )
        )
    draft = Manifest(
        name=name,
        base_model=base.name,
        base_fingerprint=FolderIdentity.of(checkpoint).fingerprint.hex(),
        hidden_size=model.hidden_size,
        experts=tuple(experts),
        tensors={},
        tags=tuple(tags),
        **manifest,
    )
    return write_bundle(folder, draft, tensors)


def _row(
    rows: bool | Mapping[Target, np.ndarray] | None, target: Target, random: np.random.Generator, size: int
) -> np.ndarray | None:
    if isinstance(rows, Mapping):
        return rows.get(target)
    wanted = target[1] is None if rows is None else rows
    return random.standard_normal(size).astype("f4") / np.float32(np.sqrt(size)) if wanted else None

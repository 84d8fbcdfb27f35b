"""A base model that is only described, without a folder, and bundles for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moesaic.bundles import (
    BaseModel,
    Bundle,
    BundleExpert,
    BundleGateRow,
    Manifest,
    ProbeVectors,
    TensorSource,
    write_bundle,
)
from moesaic.bundles.version import mlp_parameters
from moesaic.families.model import Capacity, ExpertLayer, ExpertModule, GateRule, MoeModel

HIDDEN = 8
MODULE = ExpertModule(HIDDEN, 4, "silu")


def base_model(
    num_layers: int = 2,
    num_slots: int = 3,
    gate: GateRule | None = None,
    capacity: Capacity | None = None,
    name: str = "tiny",
) -> BaseModel:
    """Every layer has the same slots and rule."""
    rule = gate or GateRule(top_k=2)
    layer = ExpertLayer(num_slots, MODULE, {}, "float32", rule, capacity=capacity)
    model = MoeModel(
        family="played",
        num_layers=num_layers,
        hidden_size=HIDDEN,
        vocab_size=16,
        max_model_len=64,
        dtype="float32",
        mixers=(),
        experts=dict.fromkeys(range(num_layers), layer),
        dense={},
    )
    return BaseModel(hashlib.sha256(name.encode()).digest(), model)


def write_played_bundle(
    folder: Path, base: BaseModel, name: str, targets: Iterable[tuple[int, int | None]], seed: int = 0
) -> Bundle:
    """A valid bundle; new slots have gate rows."""
    random = np.random.default_rng([seed, *name.encode()])
    tensors: dict[str, TensorSource] = {}
    experts = []
    for index, (layer, slot) in enumerate(targets):
        parts = {weight: random.standard_normal(MODULE.shape(weight)) for weight in MODULE.weights}
        parts |= {"in": random.standard_normal((2, HIDDEN)), "out": random.standard_normal((2, HIDDEN))}
        if slot is None:
            parts["row"] = random.standard_normal(HIDDEN)
        tensors |= {f"{index}.{part}": TensorSource.of(values.astype("f4")) for part, values in parts.items()}
        experts.append(
            BundleExpert(
                layer,
                slot,
                "mlp",
                mlp_parameters(MODULE),
                "",
                {weight: f"{index}.{weight}" for weight in MODULE.weights},
                BundleGateRow(f"{index}.row") if slot is None else None,
                ProbeVectors(f"{index}.in", f"{index}.out"),
            )
        )
    draft = Manifest(
        name=name,
        base_model="tiny",
        base_fingerprint=base.fingerprint.hex(),
        hidden_size=HIDDEN,
        experts=tuple(experts),
        tensors={},
    )
    return write_bundle(folder, draft, tensors)

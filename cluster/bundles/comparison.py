"""What a fine-tune moved beside the experts that are packed: if anything, the experts alone are not that fine-tune."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cluster.bundles.model_folder import GateTensors, ModelFolder
from cluster.bundles.weights import dense_difference, dense_values
from moesaic.checkpoints.stored_values import have_same_values

# By a part of the name; the first that fits.
_GROUPS = (
    ("lm_head", "output head"),
    ("embed", "embeddings"),
    ("norm", "norms"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("shared", "shared experts"),
)
GATES = "other gate rows"
EXPERTS = "other experts"


@dataclass(frozen=True, slots=True)
class Moved:
    """Tensors, gate rows or experts of one group that differ from the base's."""

    group: str
    moved: int
    total: int
    # The largest difference, relative to the norm; infinite for what only one of the models has.
    largest: float

    def __str__(self) -> str:
        apart = f"by up to {percent(self.largest)}" if math.isfinite(self.largest) else "or are not in both"
        return f"{self.group}: {self.moved} of {self.total} differ {apart}"


@dataclass(frozen=True, slots=True)
class RowDifference:
    """How far the gate rows of a layer moved, by slot of both models."""

    layer: int
    rows: Mapping[int, float]


def percent(share: float) -> str:
    """0.0123 -> 1.2 %; two digits, however small."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def compare_dense(tuned: ModelFolder, base: ModelFolder) -> tuple[Moved, ...]:
    """All that routers hold, without the gates."""
    gates = {name for folder in (tuned, base) for name in _gate_names(folder.gates().values())}
    names = sorted((tuned.model.dense.keys() | base.model.dense.keys()) - gates)
    return _gather((_group(name), _difference(tuned, base, name)) for name in names)


def compare_rows(tuned: ModelFolder, base: ModelFolder) -> dict[int, RowDifference]:
    """The gate rows that both models have, by layer; empty where the gates are not known."""
    ours, theirs = tuned.gates(), base.gates()
    return {
        layer: RowDifference(layer, _row_differences(tuned, ours[layer], base, theirs[layer]))
        for layer in sorted(ours.keys() & theirs.keys())
    }


def other_rows(rows: Mapping[int, RowDifference], brought: Collection[tuple[int, int]]) -> tuple[Moved, ...]:
    """What moved in gate rows that the bundle does not bring. `brought`: (layer, slot)."""
    others = [
        apart
        for layer, difference in rows.items()
        for slot, apart in difference.rows.items()
        if (layer, slot) not in brought
    ]
    return _gather((GATES, apart) for apart in others)


def other_experts(differences: Iterable[float]) -> tuple[Moved, ...]:
    return _gather((EXPERTS, apart) for apart in differences)


def _gather(differences: Iterable[tuple[str, float]]) -> tuple[Moved, ...]:
    groups: dict[str, list[float]] = {}
    for group, apart in differences:
        groups.setdefault(group, []).append(apart)
    return tuple(
        Moved(group, sum(apart > 0 for apart in all_apart), len(all_apart), max(all_apart))
        for group, all_apart in groups.items()
        if any(all_apart)
    )


def _group(name: str) -> str:
    return next((group for part, group in _GROUPS if part in name), "other tensors")


def _difference(tuned: ModelFolder, base: ModelFolder, name: str) -> float:
    ours, theirs = tuned.model.dense.get(name), base.model.dense.get(name)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.inf
    one, other = tuned.checkpoint.tensors[ours.source], base.checkpoint.tensors[theirs.source]
    if ours == theirs and ours.scales is None and have_same_values(one, other):
        return 0.0
    return dense_difference(tuned, base, name)


def _row_differences(
    tuned: ModelFolder, ours: GateTensors, base: ModelFolder, theirs: GateTensors
) -> dict[int, float]:
    own, others = _with_biases(tuned, ours), _with_biases(base, theirs)
    both = min(len(own), len(others))
    apart = np.linalg.norm(own[:both] - others[:both], axis=1)
    norms = np.linalg.norm(others[:both], axis=1)
    return {
        slot: 0.0 if apart[slot] == 0 else float(apart[slot] / norms[slot]) if norms[slot] else math.inf
        for slot in range(both)
    }


def _with_biases(folder: ModelFolder, gate: GateTensors) -> np.ndarray:
    """[E, D + biases]."""
    columns = [dense_values(folder, gate.weight)]
    columns += [dense_values(folder, name)[:, None] for name in (gate.bias, gate.selection_bias) if name]
    return np.concatenate(columns, axis=1)


def _gate_names(gates: Iterable[GateTensors]) -> Iterable[str]:
    for gate in gates:
        yield from filter(None, (gate.weight, gate.bias, gate.selection_bias))

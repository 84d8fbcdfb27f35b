"""The model's costs, fitted to measured steps: least squares on relative errors, with no cost below zero.

Every measured point has a step's router, compute and overhead time, so the three are fitted separately, each
with at most three unknowns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from steps.model import Costs, Load, ModelShape, Node, layer_bytes, layer_demand


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step.

    `threads_share` is the part of the machine that each worker has while it computes.
    """

    name: str
    load: Load
    router_s: float
    compute_s: float
    overhead_s: float
    threads_share: float = 1.0

    @property
    def total_s(self) -> float:
        return self.router_s + self.compute_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class Fit:
    """The machine and the costs of the software, as fitted to the points."""

    node: Node
    costs: Costs


def fit_costs(shape: ModelShape, points: Sequence[Point]) -> Fit:
    """Fits node and costs. Raises ValueError when there are too few points to separate the costs."""
    if len({point.load.rows for point in points}) < 2:
        raise ValueError("at least two numbers of rows are needed")
    demands = [layer_demand(shape, point.load) for point in points]
    pass_s, byte_s, flop_s = least_squares(
        [
            (
                shape.layers,
                shape.layers * demand.busiest_experts * shape.expert_bytes / point.threads_share,
                shape.layers * demand.busiest_rows * 2 * shape.expert_parameters / point.threads_share,
            )
            for point, demand in zip(points, demands, strict=True)
        ],
        [point.compute_s for point in points],
    )
    node = Node(bandwidth=1 / max(byte_s, 1e-15), flops=1 / max(flop_s, 1e-18))
    call_s, fan_out_s, wire_s = least_squares(
        [
            (
                shape.layers,
                shape.layers * demand.workers_asked,
                shape.layers * layer_bytes(shape, point.load.rows, demand.workers_asked),
            )
            for point, demand in zip(points, demands, strict=True)
        ],
        [point.overhead_s for point in points],
    )
    # One shape cannot separate a router's bytes from its modules, so its weights are taken to be read as fast
    # as experts.
    floor_s = shape.router_parameters * shape.weight_bytes / node.bandwidth
    layer_s, row_s = least_squares(
        [(shape.layers, point.load.rows) for point in points],
        [max(0.0, point.router_s - floor_s) for point in points],
        [point.router_s for point in points],
    )
    row_s = max(0.0, row_s - 2 * shape.router_parameters / node.flops)
    return Fit(node, Costs(layer_s, row_s, pass_s, call_s, fan_out_s, wire_s))


def least_squares(
    features: Sequence[Sequence[float]], values: Sequence[float], scales: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Coefficients, none negative, with the least sum of squared relative errors.

    There are few unknowns, so every subset of them is tried.
    """
    weights = 1 / np.maximum(np.asarray(values if scales is None else scales, dtype=float), 1e-12)
    matrix = np.asarray(features, dtype=float) * weights[:, None]
    target = np.asarray(values, dtype=float) * weights
    # Bytes and counts differ by ten orders of magnitude.
    norms = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    matrix = matrix / norms
    best, best_error = np.zeros(matrix.shape[1]), float(target @ target)
    for size in range(1, matrix.shape[1] + 1):
        for subset in combinations(range(matrix.shape[1]), size):
            solution = np.linalg.lstsq(matrix[:, subset], target, rcond=None)[0]
            error = float(np.sum((matrix[:, subset] @ solution - target) ** 2))
            if (solution >= 0).all() and error < best_error - 1e-15:
                best = np.zeros(matrix.shape[1])
                best[list(subset)] = solution
                best_error = error
    return tuple(float(value) for value in best / norms)

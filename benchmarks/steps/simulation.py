"""The same step, simulated event by event.

Routing is random, the router fans out serially, a node has one network card, and a layer ends with a barrier.
The simulation checks the equations where they approximate: the expected maximum over workers, and what
overlaps. It is deterministic for a seed.
"""

from __future__ import annotations

import heapq

import numpy as np

from steps.model import Costs, Load, ModelShape, Node

STEPS = 40


def simulate(
    shape: ModelShape,
    load: Load,
    router: Node,
    worker: Node,
    costs: Costs,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> float:
    """The mean seconds of a step."""
    draw = np.random.default_rng(seed)
    weights = 1 / (np.arange(shape.experts) + 1) ** load.skew
    router_layer_s = (
        costs.router_layer_s
        + shape.router_parameters * shape.weight_bytes / router.bandwidth / shape.layers
        + load.rows * (2 * shape.router_parameters / router.flops + costs.router_row_s) / shape.layers
    )
    total_s = 0.0
    for _ in range(steps * shape.layers):
        # The largest sums of log weights and Gumbel noise are experts drawn one after another without
        # replacement.
        keys = np.log(weights) + draw.gumbel(size=(load.rows, shape.experts))
        slots = np.argpartition(-keys, shape.experts_per_token - 1, axis=1)[:, : shape.experts_per_token]
        total_s += router_layer_s + _layer(shape, load, worker, costs, slots)
    return total_s / steps


def _layer(shape: ModelShape, load: Load, worker: Node, costs: Costs, slots: np.ndarray) -> float:
    """Seconds from the first send of a layer to its last answer, decoded."""
    owners = slots % load.workers
    row = shape.hidden * shape.row_bytes
    now_s = costs.call_s / 2
    answers: list[tuple[float, int]] = []
    for index in np.unique(owners):
        mine = owners == index
        rows_there = int(mine.any(axis=1).sum()) * row
        experts = len(np.unique(slots[mine]))
        rows = int(mine.sum())
        # The router's CPU and its network card send one message after another.
        now_s += costs.fan_out_s / 2 + rows_there * costs.byte_s
        compute_s = (
            costs.pass_s
            + experts * shape.expert_bytes / worker.bandwidth
            + rows * 2 * shape.expert_parameters / worker.flops
        )
        heapq.heappush(answers, (now_s + costs.round_trip_s + compute_s, rows * row))
    while answers:
        ready_s, size = heapq.heappop(answers)
        now_s = max(now_s, ready_s) + costs.fan_out_s / 2 + size * costs.byte_s
    return now_s + costs.call_s / 2

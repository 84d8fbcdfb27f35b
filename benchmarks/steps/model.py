"""Step time = router + layers x (busiest worker + transport): a few equations, nothing else.

One step computes one token of every row. A layer waits for the slowest of its workers, and a worker's time is that of
the expert weights it reads plus that of the products, so what counts is how many distinct experts the busiest worker is
asked for, and how many rows. The transport costs once a layer, again for every worker asked, and by the byte.

    step      = router + layers x (compute + overhead)
    router    = layers x fixed + bytes / bandwidth + rows x (flops / rate + handling)
    compute   = pass + distinct experts of the busiest worker x bytes / bandwidth + its rows x flops / rate
    overhead  = call + workers asked x fan-out + bytes both ways x byte cost + round trip

Left out: the growth of attention with the context, and overlap of micro-batches.
"""

# Letters: E experts a layer, K experts a token, W workers that share a layer.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a mixture-of-experts model matters to the time of a step. Parameters are counts, not bytes."""

    name: str
    layers: int
    hidden: int
    experts: int
    experts_per_token: int
    expert_parameters: int
    # Read by the router in every step.
    router_parameters: int
    weight_bytes: int
    row_bytes: int

    @property
    def expert_bytes(self) -> int:
        return self.expert_parameters * self.weight_bytes


@dataclass(frozen=True, slots=True)
class Node:
    """What a machine does: weights read per second in bytes, operations per second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of software: per layer in the router, per row in the router, per pass in a worker, per call, per worker asked,
    per byte; and the network's round trip."""

    router_layer_s: float
    router_row_s: float
    pass_s: float
    call_s: float
    fan_out_s: float
    byte_s: float
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a step asks for: rows, and how its experts are spread. `skew` 0 is even; 1 is Zipf's."""

    rows: int
    workers: int
    skew: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step, by where they go."""

    router_s: float
    compute_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        return self.router_s + self.compute_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class Demand:
    """What one layer asks of its workers, on average: of the busiest one, and of all."""

    busiest_experts: float
    busiest_rows: float
    workers_asked: float
    distinct_experts: float


def step_time(shape: ModelShape, load: Load, router: Node, worker: Node, costs: Costs) -> Step:
    demand = layer_demand(shape, load)
    compute_s = (
        costs.pass_s
        + demand.busiest_experts * shape.expert_bytes / worker.bandwidth
        + demand.busiest_rows * 2 * shape.expert_parameters / worker.flops
    )
    overhead_s = (
        costs.call_s
        + demand.workers_asked * costs.fan_out_s
        + layer_bytes(shape, load.rows, demand.workers_asked) * costs.byte_s
        + costs.round_trip_s
    )
    router_s = (
        shape.layers * costs.router_layer_s
        + shape.router_parameters * shape.weight_bytes / router.bandwidth
        + load.rows * (2 * shape.router_parameters / router.flops + costs.router_row_s)
    )
    return Step(router_s, shape.layers * compute_s, shape.layers * overhead_s)


def layer_demand(shape: ModelShape, load: Load) -> Demand:
    """Expectations under independent routing. Experts lie on workers in turn, so that hot neighbours are apart."""
    chosen = inclusion(shape.experts, shape.experts_per_token, load.skew)
    shares = [chosen[index :: load.workers] for index in range(load.workers)]
    used = [[1 - (1 - share) ** load.rows for share in worker] for worker in shares]
    least = math.ceil(shape.experts_per_token / load.workers)
    return Demand(
        busiest_experts=max(least, expected_maximum([count_distribution(worker) for worker in used])),
        busiest_rows=max(least, _busiest_rows(shares, load.rows)),
        workers_asked=sum(1 - _none_chosen(worker, shape, load) for worker in shares),
        distinct_experts=sum(sum(worker) for worker in used),
    )


def inclusion(experts: int, experts_per_token: int, skew: float) -> list[float]:
    """How likely each expert is among the chosen ones of a token; adds up to `experts_per_token`."""
    weights = [1 / (index + 1) ** skew for index in range(experts)]
    left, chosen = float(experts_per_token), [0.0] * experts
    open_ = set(range(experts))
    # Nobody is chosen more than always: what a hot expert cannot take goes to the others.
    while open_:
        total = sum(weights[index] for index in open_)
        full = {index for index in open_ if left * weights[index] >= total}
        if not full:
            for index in open_:
                chosen[index] = left * weights[index] / total
            break
        for index in full:
            chosen[index] = 1.0
        left -= len(full)
        open_ -= full
    return chosen


def count_distribution(probabilities: Sequence[float]) -> list[float]:
    """How likely it is that 0, 1, 2, … of independent events happen."""
    distribution = [1.0]
    for probability in probabilities:
        grown = [0.0] * (len(distribution) + 1)
        for count, mass in enumerate(distribution):
            grown[count] += mass * (1 - probability)
            grown[count + 1] += mass * probability
        distribution = grown
    return distribution


def expected_maximum(distributions: Sequence[Sequence[float]]) -> float:
    """Of independent counts, each given by its distribution."""
    longest = max(map(len, distributions))
    below = [0.0] * len(distributions)
    total = 0.0
    for count in range(longest - 1):
        below = [
            mass + (distribution[count] if count < len(distribution) else 0.0)
            for mass, distribution in zip(below, distributions, strict=True)
        ]
        total += 1 - math.prod(below)
    return total


def layer_bytes(shape: ModelShape, rows: int, workers_asked: float) -> float:
    """Both ways: a row goes to every worker that holds one of its experts, and comes back once per expert."""
    there = rows * min(shape.experts_per_token, workers_asked)
    return (there + rows * shape.experts_per_token) * shape.hidden * shape.row_bytes


def _busiest_rows(shares: Sequence[Sequence[float]], rows: int) -> float:
    """The largest of W nearly normal counts: the hottest mean, plus what chance adds among W (Blom's approximation)."""
    means = [rows * sum(worker) for worker in shares]
    spread = math.sqrt(max(rows * sum(share * (1 - share) for share in worker) for worker in shares))
    workers = len(shares)
    luck = NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25)) if workers > 1 else 0.0
    return max(means) + luck * spread


def _none_chosen(share: Sequence[float], shape: ModelShape, load: Load) -> float:
    """How likely a worker is asked for nothing. Even routing draws without replacement; with skew, independence will do."""
    if load.skew:
        once = math.prod(1 - probability for probability in share)
    else:
        others = shape.experts - len(share)
        once = math.comb(others, shape.experts_per_token) / math.comb(shape.experts, shape.experts_per_token)
    return once**load.rows

"""A model of step time: router + layers x (busiest worker + transport).

One step computes one token of every row. A layer waits for the slowest of its workers. A worker's time is
that of reading expert weights plus that of the products, so it depends on the distinct experts and the rows
of the busiest worker. The transport has a cost for each layer, for each worker that is called, and for each
byte.

    step      = router + layers x (compute + overhead)
    router    = layers x fixed + bytes / bandwidth + rows x (flops / rate + handling)
    compute   = pass + distinct experts of the busiest worker x bytes / bandwidth + its rows x flops / rate
    overhead  = call + workers asked x fan-out + bytes both ways x byte cost + round trip

Left out are the growth of attention with the context, and the overlap of micro-batches.

E is the number of experts of a layer, K that of a token, and W the number of workers that share a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a mixture-of-experts model that decide the time of a step.

    Parameters are counts, not bytes.
    """

    name: str
    layers: int
    hidden: int
    experts: int
    experts_per_token: int
    expert_parameters: int
    # The parameters that the router reads in every step.
    router_parameters: int
    weight_bytes: int
    row_bytes: int

    @property
    def expert_bytes(self) -> int:
        return self.expert_parameters * self.weight_bytes


@dataclass(frozen=True, slots=True)
class Node:
    """The rates of a machine: bytes of weights read per second, operations per second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that the software takes, and the network's round trip.

    The costs are those of a layer in the router, a row in the router, a pass in a worker, a layer's call,
    each worker that is called, and a byte.
    """

    router_layer_s: float
    router_row_s: float
    pass_s: float
    call_s: float
    fan_out_s: float
    byte_s: float
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """The rows of a step, and how its experts are spread. A `skew` of 0 is even routing, 1 is Zipf's law."""

    rows: int
    workers: int
    skew: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """The seconds of one step in the router, in computing and in overhead."""

    router_s: float
    compute_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        return self.router_s + self.compute_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class Demand:
    """The average demand of one layer on its workers: on the busiest one, and on all."""

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
    """Expectations under independent routing.

    Experts are dealt out to the workers in turn, which separates hot neighbours.
    """
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
    """The probability that each expert is chosen for a token; the sum is `experts_per_token`."""
    weights = [1 / (index + 1) ** skew for index in range(experts)]
    left, chosen = float(experts_per_token), [0.0] * experts
    open_ = set(range(experts))
    # No probability exceeds 1: the excess of a hot expert goes to the others.
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
    """The probabilities that 0, 1, 2, … of independent events happen."""
    distribution = [1.0]
    for probability in probabilities:
        grown = [0.0] * (len(distribution) + 1)
        for count, mass in enumerate(distribution):
            grown[count] += mass * (1 - probability)
            grown[count + 1] += mass * probability
        distribution = grown
    return distribution


def expected_maximum(distributions: Sequence[Sequence[float]]) -> float:
    """The expected maximum of independent counts, each given by its distribution."""
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
    """Bytes both ways: a row goes to each worker with one of its experts, and comes back once per expert."""
    there = rows * min(shape.experts_per_token, workers_asked)
    return (there + rows * shape.experts_per_token) * shape.hidden * shape.row_bytes


def _busiest_rows(shares: Sequence[Sequence[float]], rows: int) -> float:
    """The largest of W nearly normal counts: the largest mean, plus Blom's approximation of the spread."""
    means = [rows * sum(worker) for worker in shares]
    spread = math.sqrt(max(rows * sum(share * (1 - share) for share in worker) for worker in shares))
    workers = len(shares)
    luck = NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25)) if workers > 1 else 0.0
    return max(means) + luck * spread


def _none_chosen(share: Sequence[float], shape: ModelShape, load: Load) -> float:
    """The probability that a worker is not called.

    Even routing draws without replacement; skewed is taken as independent.
    """
    if load.skew:
        once = math.prod(1 - probability for probability in share)
    else:
        others = shape.experts - len(share)
        once = math.comb(others, shape.experts_per_token) / math.comb(shape.experts, shape.experts_per_token)
    return once**load.rows

"""Forecasts for clusters of 8, 64 and 512 nodes, by the model's equations with a cluster's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steps.model import Costs, Load, ModelShape, Node, Step, layer_demand, step_time

NODES = (8, 64, 512)
BATCHES = (1, 16, 64, 256)

MIXTRAL_8X7B = ModelShape(
    name="Mixtral 8x7B",
    layers=32,
    hidden=4096,
    experts=8,
    experts_per_token=2,
    expert_parameters=3 * 4096 * 14336,
    # 46.7 B less the experts and the embedding, of which a step reads a row.
    router_parameters=46_702_792_704 - 256 * 3 * 4096 * 14336 - 32_000 * 4096,
    weight_bytes=2,
    row_bytes=2,
)
# No such model is public. With this shape "8x220B" has 1.2 T parameters, of which attention is shared:
# 120 layers of 12,288, attention 4 D^2, experts 8 D^2, a vocabulary of 100,000.
EIGHT_220B = ModelShape(
    name="8x220B",
    layers=120,
    hidden=12288,
    experts=8,
    experts_per_token=2,
    expert_parameters=8 * 12288**2,
    router_parameters=120 * 4 * 12288**2 + 100_000 * 12288,
    weight_bytes=2,
    row_bytes=2,
)

# One H200: 4.3 TB/s and 790 TFLOP/s in bfloat16. These figures are arithmetic, not measured.
H200 = Node(bandwidth=4.3e12, flops=790e12)
H200_MEMORY_BYTES = 141e9
# A layer takes 250 us of an idle gRPC stream with its first worker and 80 us for each further one, at 100
# Gb/s, and a kernel launch of 40 us.
H200_GRPC = Costs(
    router_layer_s=40e-6, router_row_s=0.0, pass_s=40e-6, call_s=170e-6, fan_out_s=80e-6, byte_s=8 / 100e9
)
# The same machines if the exchange of a layer took 30 us and each further worker 5 us, as a lean data plane
# would have to.
H200_LEAN = Costs(
    router_layer_s=40e-6, router_row_s=0.0, pass_s=40e-6, call_s=25e-6, fan_out_s=5e-6, byte_s=8 / 400e9
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of cluster: its machines, its costs, the bytes of a weight, and the memory of a machine."""

    name: str
    router: Node
    worker: Node
    costs: Costs
    weight_bytes: int
    # None stands for as much as the model needs.
    memory_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Saturation:
    """The routers, each with its own batch, that keep all nodes busy, and the tokens that they write
    together.

    Rows of different routers count as separate passes, so joined passes would do better.
    """

    routers: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """One model on one kind of cluster at one batch size. From E nodes on, the step no longer changes."""

    rows: int
    step: Step
    by_nodes: Mapping[int, Saturation]

    @property
    def tokens_per_s(self) -> float:
        """The rate of one router alone."""
        return self.rows / self.step.total_s


def forecast(
    shape: ModelShape, kind: Kind, nodes: Sequence[int] = NODES, batches: Sequence[int] = BATCHES
) -> tuple[Forecast, ...]:
    """Forecasts for several batch sizes, each with several numbers of nodes.

    An expert of one layer lies on one node; nodes beyond the number of experts of all layers hold copies. A
    layer has at most E workers, so more nodes than that do not shorten a router's step: they hold other
    layers, and serve other routers meanwhile.
    """
    return tuple(_forecast(shape, kind, nodes, rows) for rows in batches)


def _forecast(shape: ModelShape, kind: Kind, nodes: Sequence[int], rows: int) -> Forecast:
    load = Load(rows, workers=shape.experts)
    step = step_time(shape, load, kind.router, kind.worker, kind.costs)
    busy_s = node_seconds(shape, load, kind)
    return Forecast(
        rows,
        step,
        {number: Saturation(number * step.total_s / busy_s, number * rows / busy_s) for number in nodes},
    )


def experts_bytes(shape: ModelShape, nodes: int) -> int:
    """The bytes of experts on the fullest node."""
    return shape.expert_bytes * math.ceil(shape.layers * shape.experts / nodes)


def router_bytes(shape: ModelShape) -> int:
    return shape.router_parameters * shape.weight_bytes


def node_seconds(shape: ModelShape, load: Load, kind: Kind) -> float:
    """The time that all nodes together spend on a step of one router, whose rows join no others."""
    demand = layer_demand(shape, load)
    assignments = load.rows * shape.experts_per_token
    return shape.layers * (
        demand.workers_asked * kind.costs.pass_s
        + demand.distinct_experts * shape.expert_bytes / kind.worker.bandwidth
        + assignments * 2 * shape.expert_parameters / kind.worker.flops
    )

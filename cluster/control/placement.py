"""Placement: the experts of each worker, and the nodes of workers and routers. Pure functions.

In each layer every worker gets a quota: the even share, or its share by weight. The quotas are laid end to
end around the circle of the layer's slots, which gives every slot its copies and no worker the same expert
twice, so that losing one worker never loses two copies of an expert. What cannot be split evenly in one layer
is balanced in the next, so that bytes stay even as well: the layers of a dense model, which have one expert
each, go around the workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel
from moesaic.settings import Device

MAX_WORKERS = 64
# Ray counts fractions of a GPU in ten-thousandths.
_GPU_SHARES = 10_000


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the Ray cluster and its resources."""

    id: str
    address: str
    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker or router runs, and its share of that node."""

    node: Node
    num_gpus: float
    threads: int


class LayerLoad(NamedTuple):
    """The experts of one layer that have to be placed."""

    num_slots: int
    # The size of one expert.
    num_bytes: int


def layer_loads(model: MoeModel) -> dict[int, LayerLoad]:
    """The load of every layer that has experts."""
    return {
        layer: LayerLoad(num_slots, model.expert_bytes(layer)) for layer, num_slots in model.num_slots.items()
    }


def place_experts(
    layers: Mapping[int, LayerLoad],
    num_workers: int,
    replicas: int = 1,
    weights: Sequence[float] | None = None,
) -> tuple[frozenset[ExpertAddress], ...]:
    """The experts of each worker.

    Every expert is on exactly `replicas` different workers. Without `weights` the numbers of experts differ
    by at most one between workers in every layer, and the bytes by at most one expert overall; with `weights`
    both follow these as far as whole experts allow. No worker is left empty. Raises InvalidArgument with
    field `workers`, `replicas` or `weights`.
    """
    _check_counts(sum(load.num_slots for load in layers.values()), num_workers, replicas)
    wanted = [Fraction(1)] * num_workers if weights is None else _checked(weights, num_workers)
    held: list[set[ExpertAddress]] = [set() for _ in range(num_workers)]
    # By how many bytes each worker is below its share of the layers so far.
    behind = [Fraction(0)] * num_workers
    # Layers of large experts come first, so that layers of small ones can balance them.
    for layer, load in sorted(layers.items(), key=lambda item: -item[1].num_bytes):
        shares = _shares(load.num_slots, replicas, wanted)
        behind = [bytes_ + share * load.num_bytes for bytes_, share in zip(behind, shares, strict=True)]
        quotas = _quotas(shares, behind, load.num_bytes)
        behind = [bytes_ - quota * load.num_bytes for bytes_, quota in zip(behind, quotas, strict=True)]
        position = 0
        for experts, quota in zip(held, quotas, strict=True):
            experts.update(
                ExpertAddress(layer, index % load.num_slots) for index in range(position, position + quota)
            )
            position += quota
    if empty := [index for index, experts in enumerate(held) if not experts]:
        raise InvalidArgument(f"weights: worker {empty[0]} would hold no expert", field="weights")
    return tuple(map(frozenset, held))


def seat_workers(
    nodes: Sequence[Node],
    num_workers: int | None,
    device: Device,
    *,
    home: str,
    num_routers: int = 1,
    at_most: int = MAX_WORKERS,
) -> tuple[Seat, ...]:
    """The node, GPU share and threads of each worker.

    A node has one place per GPU, or one place if it has no GPU or `device` is cpu. If `num_workers` is None,
    each place gets one worker, up to `at_most`; otherwise the workers go around the places. Routers get a
    share of the GPUs of their nodes, but none of the workers' cores: a router is idle while workers compute
    for it.
    """
    places = _places(nodes, device)
    if not places:
        raise InvalidArgument("device: no node of the cluster has a GPU", field="device")
    count = min(len(places), at_most) if num_workers is None else num_workers
    seated = [places[index % len(places)] for index in range(count)]
    routers = _router_nodes(nodes, num_routers, device, home)
    return tuple(
        Seat(
            node,
            _gpu_share(node, seated.count(node) + routers.count(node), device),
            threads=_thread_share(node, seated.count(node)),
        )
        for node in seated
    )


def seat_routers(
    nodes: Sequence[Node], workers: Sequence[Seat], num_routers: int, device: Device, *, home: str
) -> tuple[Seat, ...]:
    """The node, GPU share and threads of each router. The first is on `home`, the others on nodes like it.

    Routers of one node share its cores with each other, not with the workers there.
    """
    seated = _router_nodes(nodes, num_routers, device, home)
    held = [worker.node for worker in workers]
    return tuple(
        Seat(
            node,
            _gpu_share(node, held.count(node) + seated.count(node), device),
            threads=_thread_share(node, seated.count(node)),
        )
        for node in seated
    )


def _check_counts(num_experts: int, num_workers: int, replicas: int) -> None:
    if not 1 <= num_workers <= MAX_WORKERS:
        raise InvalidArgument(f"workers: must be in [1, {MAX_WORKERS}]", field="workers")
    if not num_experts:
        raise InvalidArgument("workers: the model has no experts for one to hold", field="workers")
    if replicas < 1:
        raise InvalidArgument("replicas: must be at least 1", field="replicas")
    if replicas > num_workers:
        raise InvalidArgument(
            f"replicas: {replicas} copies of an expert need {replicas} workers, there are {num_workers}",
            field="replicas",
        )
    copies = num_experts * replicas
    if num_workers > copies:
        raise InvalidArgument(
            f"workers: {num_workers} workers for {copies} experts: at most {copies}", field="workers"
        )


def _checked(weights: Sequence[float], num_workers: int) -> list[Fraction]:
    if len(weights) != num_workers:
        raise InvalidArgument(f"weights: must name all {num_workers} workers", field="weights")
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise InvalidArgument("weights: must be finite and above 0", field="weights")
    return [Fraction(weight) for weight in weights]


def _shares(num_slots: int, replicas: int, wanted: Sequence[Fraction]) -> list[Fraction]:
    """The exact share of every worker in the experts of a layer, capped at one copy of every expert."""
    shares = [Fraction(0)] * len(wanted)
    open_workers, left = set(range(len(wanted))), Fraction(num_slots * replicas)
    while open_workers:
        total = sum(wanted[worker] for worker in open_workers)
        full = {worker for worker in open_workers if left * wanted[worker] > num_slots * total}
        for worker in full or open_workers:
            shares[worker] = Fraction(num_slots) if full else left * wanted[worker] / total
        open_workers -= full or open_workers
        left -= num_slots * len(full)
    return shares


def _quotas(shares: Sequence[Fraction], behind: Sequence[Fraction], expert_bytes: int) -> list[int]:
    """Whole numbers: shares are rounded down, or up for the workers that are furthest behind in bytes."""
    quotas = [math.floor(share) for share in shares]
    can_round_up = [worker for worker, share in enumerate(shares) if share > quotas[worker]]
    furthest_first = sorted(
        can_round_up, key=lambda worker: (quotas[worker] * expert_bytes - behind[worker], worker)
    )
    for worker in islice(furthest_first, int(sum(shares)) - sum(quotas)):
        quotas[worker] += 1
    return quotas


def _places(nodes: Sequence[Node], device: Device) -> list[Node]:
    """One entry per place; the first place of every node comes before the second place of any."""
    places: list[tuple[int, Node]] = []
    for node in nodes:
        if _uses_gpu(node, device):
            places += [(gpu, node) for gpu in range(node.num_gpus)]
        elif device != "cuda":
            places.append((0, node))
    return [node for _, node in sorted(places, key=lambda place: place[0])]


def _router_nodes(nodes: Sequence[Node], num_routers: int, device: Device, home: str) -> list[Node]:
    """The routers' nodes, with GPUs only if `home` has one: otherwise routers would give different tokens."""
    first = next(node for node in nodes if node.id == home)
    others = [node for node in nodes if node != first and _uses_gpu(node, device) == _uses_gpu(first, device)]
    alike = [first, *others]
    return [alike[index % len(alike)] for index in range(num_routers)]


def _uses_gpu(node: Node, device: Device) -> bool:
    return device != "cpu" and node.num_gpus > 0


def _gpu_share(node: Node, num_tenants: int, device: Device) -> float:
    """The same for all processes of a node, so that Ray can pack the shares of its GPUs in any order."""
    if not _uses_gpu(node, device):
        return 0.0
    return _GPU_SHARES // math.ceil(num_tenants / node.num_gpus) / _GPU_SHARES


def _thread_share(node: Node, num_processes: int) -> int:
    return max(1, node.num_cpus // num_processes)

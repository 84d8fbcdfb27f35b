"""Placement: the experts of each worker, and the nodes of workers and routers. Pure functions.

In each layer every worker gets a quota: the even share, or its share by weight. The quotas are laid end to
end around the circle of the layer's slots, which gives every slot its copies and no worker the same expert
twice, so that losing one worker never loses two copies of an expert. The workers of one host lie side by side
on the circle, and together hold no more than once around it: so losing a host never loses two copies either,
wherever there are enough hosts. What cannot be split evenly in one layer is balanced in the next, so that bytes
stay even as well: the layers of a dense model, which have one expert each, go around the workers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice
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
    """One machine of the Ray cluster and its resources.

    `free_cpus` are those that nobody has reserved yet; None on a local Ray, where nothing is reserved.
    """

    id: str
    address: str
    num_cpus: int
    num_gpus: int
    free_cpus: int | None = None


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
    hosts: Sequence[str] | None = None,
) -> tuple[frozenset[ExpertAddress], ...]:
    """The experts of each worker. `hosts` names the host of each worker; without it each has one of its own.

    Every expert is on exactly `replicas` different workers, and on as many different hosts where there are so
    many; with fewer hosts, on each as few times as their workers allow. Without `weights` the numbers of
    experts differ by at most one between workers in every layer, unless a host with fewer workers has to take
    more for that, and with workers on hosts of their own the bytes by at most one expert overall; with
    `weights` both follow these as far as whole experts allow. No worker is left empty. Raises InvalidArgument
    with field `workers`, `replicas` or `weights`.
    """
    _check_counts(sum(load.num_slots for load in layers.values()), num_workers, replicas)
    wanted = [Fraction(1)] * num_workers if weights is None else _checked(weights, num_workers)
    teams = _teams(range(num_workers) if hosts is None else hosts)
    turns = [min(_copies_on_one_host(teams, replicas), len(team)) for team in teams]
    held: list[set[ExpertAddress]] = [set() for _ in range(num_workers)]
    # By how many bytes each worker is below its share of the layers so far.
    behind = [Fraction(0)] * num_workers
    # Layers of large experts come first, so that layers of small ones can balance them.
    for layer, load in sorted(layers.items(), key=lambda item: -item[1].num_bytes):
        position = 0
        for worker, quota in _spread(load, replicas, wanted, teams, turns, behind):
            held[worker].update(
                ExpertAddress(layer, index % load.num_slots) for index in range(position, position + quota)
            )
            position += quota
    if empty := [index for index, experts in enumerate(held) if not experts]:
        raise InvalidArgument(f"weights: worker {empty[0]} would hold no expert", field="weights")
    return tuple(map(frozenset, held))


@dataclass(frozen=True, slots=True)
class Shelf:
    """A worker that runs, as a place for experts that are added to a model."""

    worker: str
    host: str
    room_bytes: int
    # How many added experts it holds.
    num_added: int = 0


def choose_shelves(
    shelves: Sequence[Shelf], sizes: Mapping[str, int], copies: int, holders: Collection[str] = ()
) -> list[str]:
    """The workers that hold `copies` of an added expert, whose size may differ between workers; fewer where there are
    fewer workers. `holders` have it already, and stay.

    Copies go to hosts that have none, then where there is room, then to the worker with the fewest added experts, then
    to the one with most room.
    """
    chosen = [shelf for shelf in shelves if shelf.worker in holders]
    left = [shelf for shelf in shelves if shelf.worker not in holders]
    while left and len(chosen) < copies:
        hosts = Counter(shelf.host for shelf in chosen)
        best = min(
            left,
            key=lambda shelf: (
                hosts[shelf.host],
                sizes[shelf.worker] > shelf.room_bytes,
                shelf.num_added,
                -shelf.room_bytes,
                shelf.worker,
            ),
        )
        chosen.append(best)
        left.remove(best)
    return [shelf.worker for shelf in chosen]


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

    A node has one place per GPU, or one place if it has no GPU or `device` is cpu; a node that reserves no
    CPUs for Ray has none. If `num_workers` is None, each place gets one worker, up to `at_most`; otherwise the
    workers go around the places. Each reserves one CPU, and a node takes no more than it has free. Routers get
    a share of the GPUs of their nodes, but none of the workers' cores: a router is idle while workers compute
    for it. Raises InvalidArgument with field `device` or `workers`.
    """
    places = _places(nodes, device)
    if not places and device == "cuda":
        raise InvalidArgument("device: no node of the cluster has a GPU", field="device")
    routers = _router_nodes(nodes, num_routers, device, home)
    room = _Room(nodes, reserved=routers)
    if num_workers is None:
        seated, wanted = [node for node in places if room.take(node)][:at_most], min(1, at_most)
    else:
        seated, wanted = room.go_around(places, num_workers), num_workers
    if len(seated) < wanted:
        raise InvalidArgument(
            f"workers: there is room for {len(seated)} of {wanted}: each reserves one CPU of Ray, beside the "
            f"routers; free are {_free(nodes)}",
            field="workers",
        )
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
    """The node, GPU share and threads of each router. The first is on `home`, the others on nodes like it that
    have a CPU free for them.

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


def _teams(hosts: Sequence[object]) -> list[list[int]]:
    """The workers of each host, hosts in the order of their first worker."""
    teams: dict[object, list[int]] = {}
    for worker, host in enumerate(hosts):
        teams.setdefault(host, []).append(worker)
    return list(teams.values())


def _copies_on_one_host(teams: Sequence[Sequence[int]], replicas: int) -> int:
    """The least number of copies of an expert that one host must be able to hold."""
    return next(
        copies
        for copies in range(1, replicas + 1)
        if sum(min(copies, len(team)) for team in teams) >= replicas
    )


def _spread(
    load: LayerLoad,
    replicas: int,
    wanted: Sequence[Fraction],
    teams: Sequence[Sequence[int]],
    turns: Sequence[int],
    behind: list[Fraction],
) -> Iterator[tuple[int, int]]:
    """Each worker and its number of experts in a layer, in the order of the circle. Updates `behind`.

    The layer is split between the hosts first, each of which holds an expert at most as often as `turns` says,
    then between the workers of each host.
    """
    weights = [sum((wanted[worker] for worker in team), Fraction(0)) for team in teams]
    most = [load.num_slots * turn for turn in turns]
    host_shares = _shares(Fraction(load.num_slots * replicas), weights, most)
    for team, share in zip(teams, host_shares, strict=True):
        for worker, due in zip(team, _team_shares(share, team, wanted, load.num_slots), strict=True):
            behind[worker] += due * load.num_bytes
    hosts_behind = [sum((behind[worker] for worker in team), Fraction(0)) for team in teams]
    for team, quota in zip(teams, _quotas(host_shares, hosts_behind, load.num_bytes), strict=True):
        shares = _team_shares(Fraction(quota), team, wanted, load.num_slots)
        quotas = _quotas(shares, [behind[worker] for worker in team], load.num_bytes)
        for worker, taken in zip(team, quotas, strict=True):
            behind[worker] -= taken * load.num_bytes
            yield worker, taken


def _team_shares(
    total: Fraction, team: Sequence[int], wanted: Sequence[Fraction], num_slots: int
) -> list[Fraction]:
    """The exact share of each worker of a host in what the host holds of a layer."""
    return _shares(total, [wanted[worker] for worker in team], [num_slots] * len(team))


def _shares(total: Fraction, wanted: Sequence[Fraction], most: Sequence[int]) -> list[Fraction]:
    """The exact share of every part in `total`, by weight, where no part takes more than its `most`."""
    shares = [Fraction(0)] * len(wanted)
    open_parts, left = set(range(len(wanted))), total
    while open_parts:
        weight = sum(wanted[part] for part in open_parts)
        full = {part for part in open_parts if left * wanted[part] > most[part] * weight}
        for part in full or open_parts:
            shares[part] = Fraction(most[part]) if full else left * wanted[part] / weight
        open_parts -= full or open_parts
        left -= sum(most[part] for part in full)
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


class _Room:
    """The CPUs that are left on each node while processes are seated, one for each."""

    def __init__(self, nodes: Sequence[Node], reserved: Sequence[Node] = ()) -> None:
        self._left = {node.id: node.free_cpus for node in nodes}
        for node in reserved:
            self.take(node)

    def take(self, node: Node) -> bool:
        """Takes a CPU of the node, if one is left."""
        left = self._left[node.id]
        if left is None:
            return True
        self._left[node.id] = max(0, left - 1)
        return left > 0

    def go_around(self, places: Sequence[Node], count: int) -> list[Node]:
        """`count` places in turn, over and over, or as many as have room."""
        taken: list[Node] = []
        for node in cycle(places):
            if len(taken) == count or not any(map(self._has_room, places)):
                break
            if self.take(node):
                taken.append(node)
        return taken

    def _has_room(self, node: Node) -> bool:
        return self._left[node.id] != 0


def _free(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{node.free_cpus} of {node.num_cpus} on {node.address}" for node in nodes)


def _places(nodes: Sequence[Node], device: Device) -> list[Node]:
    """One entry per place; the first place of every node comes before the second place of any."""
    places: list[tuple[int, Node]] = []
    for node in nodes:
        if not node.num_cpus:
            continue
        if _uses_gpu(node, device):
            places += [(gpu, node) for gpu in range(node.num_gpus)]
        elif device != "cuda":
            places.append((0, node))
    return [node for _, node in sorted(places, key=lambda place: place[0])]


def _router_nodes(nodes: Sequence[Node], num_routers: int, device: Device, home: str) -> list[Node]:
    """The routers' nodes, with GPUs only if `home` has one: otherwise routers would give different tokens.

    The first one runs at `home` whatever is free there, because it has the public address.
    """
    first = next(node for node in nodes if node.id == home)
    others = [node for node in nodes if node != first and _uses_gpu(node, device) == _uses_gpu(first, device)]
    room = _Room(nodes, reserved=[first])
    seated = [first, *room.go_around([*others, first], num_routers - 1)]
    if len(seated) < num_routers:
        raise InvalidArgument(
            f"routers: there is room for {len(seated)} of {num_routers}: each reserves one CPU of Ray; "
            f"free are {_free(nodes)}",
            field="routers",
        )
    return seated


def _uses_gpu(node: Node, device: Device) -> bool:
    return device != "cpu" and node.num_gpus > 0


def _gpu_share(node: Node, num_tenants: int, device: Device) -> float:
    """The same for all processes of a node, so that Ray can pack the shares of its GPUs in any order."""
    if not _uses_gpu(node, device):
        return 0.0
    return _GPU_SHARES // math.ceil(num_tenants / node.num_gpus) / _GPU_SHARES


def _thread_share(node: Node, num_processes: int) -> int:
    return max(1, node.num_cpus // num_processes)

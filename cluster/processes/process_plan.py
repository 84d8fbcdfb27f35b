"""The process plan: which processes to start for some settings, a model and the nodes of a cluster. Pure.

The routers are first, because they take the longest of all processes to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.checkpoints.model_source import is_of_hub
from cluster.control.controller import Cluster, Member
from cluster.control.placement import (
    MAX_WORKERS,
    Node,
    Seat,
    layer_loads,
    place_experts,
    seat_routers,
    seat_workers,
)
from cluster.control.rollout_config import RolloutConfig
from cluster.processes.specs import (
    CONTROLLER,
    GATEWAY,
    ControllerSpec,
    ExpertWorkerSpec,
    GatewaySpec,
    ProcessSpec,
    RouterSpec,
    router_names,
)
from expert_worker.config import WorkerConfig
from gateway.config import GatewayConfig
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel
from moesaic.settings import Device, Settings
from moesaic.v1 import control_pb2
from router.config import RouterConfig


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """A process and where it runs.

    It reserves `num_cpus`; the controller and the gateway reserve none, because they hardly compute. A
    `pinned` process runs on its node and nowhere else, because it has the public address of that machine, or
    its disk.
    """

    spec: ProcessSpec
    seat: Seat
    num_cpus: int
    pinned: bool


def check_counts(settings: Settings, model: MoeModel) -> None:
    """Checks that the model can be served and spread as the settings say. Raises InvalidArgument."""
    model.context_length(settings.engine.max_model_len)
    if settings.cluster.workers is not None:
        place_experts(layer_loads(model), settings.cluster.workers, settings.cluster.replicas)


def plan_processes(
    settings: Settings,
    folder: Path,
    name: str,
    model: MoeModel,
    nodes: Sequence[Node],
    home: str,
    rollout: RolloutConfig,
    identity: FolderIdentity | None = None,
) -> tuple[PlannedProcess, ...]:
    """All processes that serve the model in `folder` as `name`. The command runs on the node with id `home`.

    The controller stays there, because the state folder of `rollout` is on that machine. Every process that reads the folder on its own node is told the `identity` that it must have there.
    Raises InvalidArgument with field `workers`, `routers`, `replicas` or `device`.
    """
    replicas = settings.cluster.replicas
    at_most = min(MAX_WORKERS, len(model.addresses) * replicas)
    num_routers = settings.cluster.routers
    seats = seat_workers(
        nodes,
        settings.cluster.workers,
        settings.device,
        home=home,
        num_routers=num_routers,
        at_most=at_most,
    )
    workers = _workers(settings, folder, model, seats, identity)
    router_seats = seat_routers(nodes, seats, num_routers, settings.device, home=home)
    routers = _routers(settings, folder, name, router_seats, identity)
    quiet_seat = Seat(router_seats[0].node, num_gpus=0.0, threads=1)
    cluster = Cluster(
        model=folder.name,
        experts=frozenset(model.addresses),
        members=(
            Member(CONTROLLER, control_pb2.PROCESS_ROLE_CONTROLLER),
            Member(GATEWAY, control_pb2.PROCESS_ROLE_GATEWAY),
            *_members((*routers, *workers)),
        ),
        base=rollout.base.fingerprint,
    )
    return (
        *routers,
        PlannedProcess(ControllerSpec(cluster, rollout), quiet_seat, num_cpus=0, pinned=True),
        *workers,
        PlannedProcess(_gateway(settings), quiet_seat, num_cpus=0, pinned=True),
    )


def _workers(
    settings: Settings, folder: Path, model: MoeModel, seats: Sequence[Seat], identity: FolderIdentity | None
) -> tuple[PlannedProcess, ...]:
    """The expert workers. There are none if the routers hold the whole model."""
    if not seats:
        return ()
    placement = _place(model, seats, settings.cluster.replicas)
    return tuple(
        PlannedProcess(
            ExpertWorkerSpec(
                WorkerConfig(
                    name=f"expert-worker-{index}",
                    model=folder,
                    experts=experts,
                    host=seat.node.address,
                    port=0,
                    device=_device(seat),
                    dtype=settings.dtype,
                    settings=settings.worker.model_copy(
                        update={"threads": settings.worker.threads or seat.threads}
                    ),
                    dense_layers=settings.dense_layers,
                    identity=identity,
                ),
                _source(settings),
            ),
            seat,
            num_cpus=1,
            pinned=False,
        )
        for index, (experts, seat) in enumerate(zip(placement, seats, strict=True))
    )


def _place(model: MoeModel, seats: Sequence[Seat], replicas: int) -> tuple[frozenset[ExpertAddress], ...]:
    """The experts of each worker, copies on different hosts. Workers on CPUs hold more where they have more cores.

    Where that would leave a worker without any expert, and where GPUs compute, all hold the same.
    """
    place = partial(
        place_experts, layer_loads(model), len(seats), replicas, hosts=[seat.node.id for seat in seats]
    )
    if any(seat.num_gpus for seat in seats):
        return place()
    try:
        return place(weights=[seat.threads for seat in seats])
    except InvalidArgument as error:
        if error.field != "weights":
            raise
        return place()


def _routers(
    settings: Settings,
    folder: Path,
    served_name: str,
    seats: Sequence[Seat],
    identity: FolderIdentity | None,
) -> tuple[PlannedProcess, ...]:
    """The routers. Only the first one is pinned, to the public address; the gateway finds the others."""
    return tuple(
        _router(settings, folder, served_name, name, seat, identity, is_public=index == 0)
        for index, (name, seat) in enumerate(zip(router_names(len(seats)), seats, strict=True))
    )


def _router(
    settings: Settings,
    folder: Path,
    served_name: str,
    name: str,
    seat: Seat,
    identity: FolderIdentity | None,
    *,
    is_public: bool,
) -> PlannedProcess:
    config = RouterConfig(
        model=folder,
        served_name=served_name,
        host=settings.host if is_public else seat.node.address,
        port=settings.grpc_port if is_public else 0,
        device=_device(seat),
        dtype=settings.dtype,
        engine=settings.engine.model_copy(update={"threads": settings.engine.threads or seat.threads}),
        dense_layers=settings.dense_layers,
        name=name,
        identity=identity,
    )
    spec = RouterSpec(name, config, is_public, settings.cluster.start_timeout_s, _source(settings))
    # The public address leaves the first router no choice, also where Ray has no CPU to reserve.
    reserved = 0 if is_public and seat.node.free_cpus == 0 else 1
    return PlannedProcess(spec, seat, num_cpus=reserved, pinned=is_public)


def _source(settings: Settings) -> str | None:
    """What a node can find by itself where it lacks the folder: a model of the hub."""
    return settings.model if settings.model is not None and is_of_hub(settings.model) else None


def _gateway(settings: Settings) -> GatewaySpec:
    config = GatewayConfig(settings.host, settings.http_port, settings.gateway)
    return GatewaySpec(config, router_names(settings.cluster.routers))


def _members(processes: Sequence[PlannedProcess]) -> Iterator[Member]:
    for process in processes:
        match process.spec:
            case ExpertWorkerSpec(config):
                yield Member(
                    config.name, control_pb2.PROCESS_ROLE_EXPERT_WORKER, config.experts, config.device
                )
            case RouterSpec(name, config):
                yield Member(name, control_pb2.PROCESS_ROLE_ROUTER, device=config.device)


def _device(seat: Seat) -> Device:
    return "cuda" if seat.num_gpus else "cpu"

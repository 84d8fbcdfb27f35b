"""Settings, a model and the nodes of a cluster -> the processes to start, each with its seat. Pure.

The router comes first: of all processes it takes longest to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.controller import Cluster, Member
from cluster.placement import MAX_WORKERS, Node, Seat, place_experts, seat_router, seat_workers
from cluster.processes import (
    CONTROLLER,
    GATEWAY,
    ROUTER,
    ControllerSpec,
    ExpertWorkerSpec,
    GatewaySpec,
    ProcessSpec,
    RouterSpec,
)
from moesaic.families import MoeModel
from moesaic.settings import Device, Settings
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """A process and where it runs. `pinned`: nowhere else, for its public address is that of this machine."""

    spec: ProcessSpec
    seat: Seat
    # What it reserves; the controller and the gateway hardly need any.
    num_cpus: int
    pinned: bool


def check_counts(settings: Settings, model: MoeModel) -> None:
    """Whether the model can be served and spread as asked, before anything runs. Raises InvalidArgument."""
    model.context_length(settings.engine.max_model_len)
    if settings.cluster.workers is not None:
        place_experts(model.num_layers, model.num_slots, settings.cluster.workers, settings.cluster.replicas)


def draw_blueprint(
    settings: Settings, folder: Path, name: str, model: MoeModel, nodes: Sequence[Node], home: str
) -> tuple[PlannedProcess, ...]:
    """All processes that serve the model in `folder` as `name`; the command runs on the node with id `home`.

    Raises InvalidArgument with field `workers`, `replicas` or `device`.
    """
    replicas = settings.cluster.replicas
    at_most = min(MAX_WORKERS, model.num_layers * model.num_slots * replicas)
    seats = seat_workers(nodes, settings.cluster.workers, settings.device, home=home, at_most=at_most)
    workers = _workers(settings, folder, model, seats)
    router_seat = seat_router(nodes, seats, settings.device, home=home)
    quiet_seat = Seat(router_seat.node, num_gpus=0.0, threads=1)
    cluster = Cluster(
        model=folder.name,
        num_layers=model.num_layers,
        num_slots=model.num_slots,
        members=_members(workers, router_seat),
    )
    return (
        PlannedProcess(_router(settings, folder, name, router_seat), router_seat, num_cpus=1, pinned=True),
        PlannedProcess(ControllerSpec(cluster), quiet_seat, num_cpus=0, pinned=False),
        *workers,
        PlannedProcess(_gateway(settings), quiet_seat, num_cpus=0, pinned=True),
    )


def _workers(
    settings: Settings, folder: Path, model: MoeModel, seats: Sequence[Seat]
) -> tuple[PlannedProcess, ...]:
    placement = place_experts(model.num_layers, model.num_slots, len(seats), settings.cluster.replicas)
    return tuple(
        PlannedProcess(
            ExpertWorkerSpec(
                name=f"expert-worker-{index}",
                model=folder,
                experts=experts,
                device=_device(seat),
                dtype=settings.dtype,
                settings=settings.worker.model_copy(
                    update={"threads": settings.worker.threads or seat.threads}
                ),
            ),
            seat,
            num_cpus=1,
            pinned=False,
        )
        for index, (experts, seat) in enumerate(zip(placement, seats, strict=True))
    )


def _router(settings: Settings, folder: Path, name: str, seat: Seat) -> RouterSpec:
    return RouterSpec(
        model=folder,
        served_name=name,
        host=settings.host,
        port=settings.grpc_port,
        device=_device(seat),
        dtype=settings.dtype,
        engine=settings.engine.model_copy(update={"threads": settings.engine.threads or seat.threads}),
        start_timeout_s=settings.cluster.start_timeout_s,
    )


def _gateway(settings: Settings) -> GatewaySpec:
    return GatewaySpec(host=settings.host, port=settings.http_port, settings=settings.gateway)


def _members(workers: Sequence[PlannedProcess], router_seat: Seat) -> tuple[Member, ...]:
    held = (
        Member(
            worker.spec.name, control_pb2.PROCESS_ROLE_EXPERT_WORKER, worker.spec.experts, worker.spec.device
        )
        for worker in workers
        if isinstance(worker.spec, ExpertWorkerSpec)
    )
    return (
        Member(CONTROLLER, control_pb2.PROCESS_ROLE_CONTROLLER),
        Member(GATEWAY, control_pb2.PROCESS_ROLE_GATEWAY),
        Member(ROUTER, control_pb2.PROCESS_ROLE_ROUTER, device=_device(router_seat)),
        *held,
    )


def _device(seat: Seat) -> Device:
    return "cuda" if seat.num_gpus else "cpu"

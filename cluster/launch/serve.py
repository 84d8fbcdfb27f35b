"""`moesaic serve`: checks the input, starts a cluster, serves, and ends cleanly.

Settings, model folder, placement and ports are checked before any process is started. Standard output carries the
ready line and nothing else; everything that Ray prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.checkpoints.memory_fit import Memory, chosen_form, fit_model
from cluster.checkpoints.model_source import DEMO_MODEL, find_model, name_model
from cluster.launch.launcher import Endpoints, Launcher
from cluster.launch.milestones import Milestones
from cluster.observation.machine_memory import read_memory
from cluster.processes.process_plan import check_counts, plan_processes
from cluster.terminal.load_progress import LoadProgress
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings
from moesaic.stop_signals import StopSignals
from moesaic.v1 import control_pb2

if TYPE_CHECKING:
    from cluster.processes.ray_cluster import RayCluster

# The controller and the gateway.
NUM_OTHER_PROCESSES = 2
# Ports above those that Ray gives its workers and below those that Linux assigns by itself, so that neither takes one
# while the processes start.
QUIET_PORTS = range(20_000, 32_768)
NUM_CANDIDATES = 64
# Present where the driver of a GPU is loaded.
_NVIDIA_DEVICE = "/dev/nvidiactl"


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model folder with complete files and a config that fits its tensors, and its name in the API."""

    folder: Path
    name: str
    shape: MoeModel
    # That memory may be short.
    warning: str | None = None


def check_model(settings: Settings) -> CheckedModel:
    """The model of the settings, checked before any process is started.

    Raises CheckpointError, or InvalidArgument when its experts cannot be placed as the settings say.
    """
    source = settings.model or str(DEMO_MODEL)
    folder = find_model(source).resolve()
    shape = describe_model(open_checkpoint(folder), settings.dense_layers)
    check_counts(settings, shape)
    warning = check_memory(settings, shape, Memory(*read_memory()), has_gpu=Path(_NVIDIA_DEVICE).exists())
    return CheckedModel(folder, settings.served_model_name or name_model(source), shape, warning)


def check_memory(settings: Settings, shape: MoeModel, memory: Memory, *, has_gpu: bool) -> str | None:
    """A warning if the weights fit on this machine only when other programs give memory back. Says nothing where other
    machines or a GPU may hold them. Raises InvalidArgument for weights that can never fit."""
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not has_gpu)
    fit = fit_model(shape, settings, memory)
    verdict = fit.fits.get(chosen_form(settings))
    if settings.cluster.address is not None or not on_cpu or verdict in (None, "fits"):
        return None
    if verdict == "no":
        raise InvalidArgument(f"model: {fit.sentence}", field="model")
    return fit.sentence


@contextlib.asynccontextmanager
async def running_cluster(
    settings: Settings,
    model: CheckedModel,
    progress: LoadProgress,
    milestones: Milestones,
    signals: StopSignals,
) -> AsyncIterator[Endpoints]:
    """A cluster that answers; it ends with the context.

    Raises StopRequested when a signal comes before the cluster answers, Unavailable when it cannot start.
    """

    def show(topology: control_pb2.GetTopologyResponse) -> None:
        milestones.look(topology)
        progress.show(topology)

    milestones.reach("input checked")
    with contextlib.redirect_stdout(sys.stderr):
        async with _connected(settings, signals) as ray:
            milestones.reach("Ray runs")
            processes = plan_processes(settings, model.folder, model.name, model.shape, ray.nodes(), ray.home)
            launcher = Launcher(ray, processes, settings)
            try:
                launcher.submit()
                with progress:
                    endpoints = await signals.unless_stopped(launcher.wait_ready(show))
                milestones.reach("ready")
                yield endpoints
            finally:
                await launcher.stop(signals.force)


@contextlib.asynccontextmanager
async def _connected(settings: Settings, signals: StopSignals) -> AsyncIterator[RayCluster]:
    """A Ray cluster to start processes on. When it dies, everything stops and the context raises Unavailable."""
    from cluster.processes.ray_cluster import RayCluster  # takes seconds: a wrong flag is reported before

    num_processes = NUM_OTHER_PROCESSES + settings.cluster.routers + (settings.cluster.workers or 1)
    ray = RayCluster.connect(settings, num_processes=num_processes)
    watch = asyncio.create_task(_stop_when_lost(ray, signals))
    try:
        yield ray
    finally:
        lost = watch.done()
        watch.cancel()
        ray.close()
        if lost:
            raise Unavailable("Ray has died, and every process of the cluster with it")


async def _stop_when_lost(ray: RayCluster, signals: StopSignals) -> None:
    await ray.lost()
    signals.stop.set()
    signals.force.set()


async def serve(settings: Settings, model: CheckedModel, *, as_json: bool) -> None:
    """Serves until a signal; then running requests may end within `cluster.drain_timeout_s`."""
    out, console = sys.stdout, Console(stderr=True)
    if model.warning is not None:
        console.print(f"warning: {model.warning}", highlight=False, markup=False)
    with StopSignals() as signals:
        async with running_cluster(
            settings, model, LoadProgress(console), Milestones(), signals
        ) as endpoints:
            print(_ready_line(endpoints, as_json=as_json), file=out, flush=True)
            await signals.stop.wait()
            console.print(
                "stopping: running requests may end; a second signal stops at once", highlight=False
            )


def _ready_line(endpoints: Endpoints, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"ready": {"http": endpoints.http, "grpc": endpoints.grpc}})
    return f"ready http={endpoints.http} grpc={endpoints.grpc}"


def with_ports(settings: Settings) -> Settings:
    """The settings with a free port in place of 0, so that a restarted server has the address of the ready line.

    Raises InvalidArgument for a port that is taken, before anything runs.
    """
    if settings.http_port and settings.http_port == settings.grpc_port:
        raise InvalidArgument("grpc_port: must differ from http_port", field="grpc_port")
    with contextlib.ExitStack() as probes:  # both are held, so that two free ports differ
        ports = {
            field: _bind(field, settings.host, port, probes)
            for field, port in (("http_port", settings.http_port), ("grpc_port", settings.grpc_port))
        }
    return settings.model_copy(update=ports)


def _bind(field: str, host: str, port: int, probes: contextlib.ExitStack) -> int:
    """Binds the port, or for 0 a free one of QUIET_PORTS, and returns it."""
    refusal: OSError | None = None
    for candidate in [port] if port else random.sample(QUIET_PORTS, NUM_CANDIDATES):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[
                0
            ]
            probe = probes.enter_context(socket.socket(family, kind, protocol))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return candidate
        except OSError as error:
            refusal = error
    assert refusal is not None
    in_use = refusal.errno == errno.EADDRINUSE
    problem = "is in use" if in_use else f"cannot be used: {refusal.strerror}"
    raise InvalidArgument(f"{field}: {host}:{port} {problem}", field=field) from refusal

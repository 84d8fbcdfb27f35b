"""`moesaic serve`: checks the input, starts a cluster, serves, and ends cleanly.

Settings, model folder, placement and ports are checked before any process is started. Standard output carries
the ready line and nothing else; everything that Ray prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.checkpoints.memory_fit import Memory, chosen_form, fit_model
from cluster.checkpoints.model_source import DEMO_MODEL, find_model, name_model
from cluster.control.rollout_config import RolloutConfig
from cluster.launch.launcher import Endpoints, Launcher
from cluster.launch.milestones import Milestones
from cluster.processes.process_plan import check_counts, plan_processes
from cluster.terminal.load_progress import LoadProgress
from moesaic.addresses import is_loopback, join_address
from moesaic.bundles import BaseModel
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.families import MoeModel, describe_model
from moesaic.kept_folder import sweep
from moesaic.machine_memory import read_memory
from moesaic.private_folder import private_folder
from moesaic.settings import Settings
from moesaic.stop_signals import StopSignals
from moesaic.v1 import control_pb2

if TYPE_CHECKING:
    from cluster.processes.ray_cluster import RayCluster

# The controller and the gateway.
NUM_OTHER_PROCESSES = 2
# Present where the driver of a GPU is loaded.
_NVIDIA_DEVICE = "/dev/nvidiactl"


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model folder with complete files and a config that fits its tensors, and its name in the API."""

    folder: Path
    name: str
    shape: MoeModel
    identity: FolderIdentity
    # Says that memory may be short.
    warning: str | None = None


def check_model(settings: Settings) -> CheckedModel:
    """The model of the settings, checked before any process is started.

    Raises CheckpointError, or InvalidArgument when its experts cannot be placed as the settings say.
    """
    source = settings.model or str(DEMO_MODEL)
    folder = find_model(source).resolve()
    checkpoint = open_checkpoint(folder)
    shape = describe_model(checkpoint, settings.dense_layers)
    check_counts(settings, shape)
    warning = check_memory(settings, shape, Memory(*read_memory()), has_gpu=Path(_NVIDIA_DEVICE).exists())
    name = settings.served_model_name or name_model(source)
    return CheckedModel(folder, name, shape, FolderIdentity.of(checkpoint), warning)


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

    with contextlib.ExitStack() as shown, contextlib.ExitStack() as kept:
        RolloutConfig.check(settings)
        milestones.reach("input checked")
        kept.enter_context(contextlib.redirect_stdout(sys.stderr))
        shown.enter_context(progress)
        progress.start_ray()
        async with _announced_stop(signals, progress), _connected(settings, signals) as ray:
            milestones.reach("Ray runs")
            progress.end_ray()
            # In a thread: a node that does not answer takes seconds, and a signal is answered meanwhile.
            nodes = await asyncio.to_thread(ray.nodes)
            for warning in await signals.unless_stopped(asyncio.to_thread(ray.examine, nodes)):
                progress.announce(f"warning: {warning}")
            base = BaseModel(model.identity.fingerprint, model.shape)
            rollout = RolloutConfig.of(settings, base, kept.enter_context(private_folder()))
            processes = plan_processes(
                settings, model.folder, model.name, model.shape, nodes, ray.home, rollout, model.identity
            )
            launcher = Launcher(ray, processes, settings)
            try:
                launcher.submit()
                endpoints = await signals.unless_stopped(launcher.wait_ready(show))
                shown.close()
                milestones.reach("ready")
                yield endpoints
            finally:
                await launcher.stop(signals.force)
                await asyncio.to_thread(sweep, Path(settings.worker.keep_weights_in))


@contextlib.asynccontextmanager
async def _announced_stop(signals: StopSignals, progress: LoadProgress) -> AsyncIterator[None]:
    """Answers the first signal at once, whatever has to end before."""

    async def announce() -> None:
        await signals.stop.wait()
        if not signals.force.is_set():
            progress.announce("stopping: a second signal stops at once")

    announcing = asyncio.create_task(announce())
    try:
        yield
    finally:
        announcing.cancel()


@contextlib.asynccontextmanager
async def _connected(settings: Settings, signals: StopSignals) -> AsyncIterator[RayCluster]:
    """A Ray cluster to start processes on. When it dies, everything stops and Unavailable is raised."""
    from cluster.processes.ray_cluster import RayCluster  # takes seconds: a wrong flag is reported before

    num_processes = NUM_OTHER_PROCESSES + settings.cluster.routers + (settings.cluster.workers or 1)
    ray = await signals.unless_stopped(
        RayCluster.connect(settings, num_processes=num_processes, force=signals.force)
    )
    watch = asyncio.create_task(_stop_when_lost(ray, signals))
    try:
        yield ray
    finally:
        lost = watch.done()
        watch.cancel()
        await ray.close()
        if lost:
            raise Unavailable("Ray has died, and every process of the cluster with it")


async def _stop_when_lost(ray: RayCluster, signals: StopSignals) -> None:
    await ray.watch()
    signals.stop.set()
    signals.force.set()


async def serve(settings: Settings, model: CheckedModel, *, as_json: bool) -> None:
    """Serves until a signal; then running requests may end within `cluster.drain_timeout_s`."""
    out, progress = sys.stdout, LoadProgress(Console(stderr=True))
    if model.warning is not None:
        progress.announce(f"warning: {model.warning}")
    with StopSignals() as signals:
        async with running_cluster(settings, model, progress, Milestones(), signals):
            print(_ready_line(settings, as_json=as_json), file=out, flush=True)
            if not is_loopback(settings.host):
                progress.announce(
                    f"whoever can reach {settings.host} can use the model: there is neither TLS nor a password"
                )
            await signals.stop.wait()


def _ready_line(settings: Settings, *, as_json: bool) -> str:
    """Where the servers listen. Nobody can call 0.0.0.0, but it says who can call."""
    http, grpc = (join_address(settings.host, port) for port in (settings.http_port, settings.grpc_port))
    if as_json:
        return json.dumps({"ready": {"http": http, "grpc": grpc}})
    return f"ready http={http} grpc={grpc}"

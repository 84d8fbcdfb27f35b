"""`moesaic serve`: check everything, start, stay up, end cleanly.

What can be wrong with the input is found before anything runs: settings, model folder, placement, ports. Standard
output carries the ready line and nothing else; whatever Ray prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.blueprint import check_counts, draw_blueprint
from cluster.launcher import Endpoints, Launcher
from cluster.load_progress import LoadProgress
from cluster.stop_signals import StopSignals
from moesaic.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel, describe_model
from moesaic.settings import Settings

DEMO_MODEL = Path(__file__).parent / "demo_model"
# Controller, router and gateway.
NUM_OTHER_PROCESSES = 3


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A folder whose files are whole and whose config fits its tensors."""

    folder: Path
    shape: MoeModel


def check(settings: Settings) -> CheckedModel:
    """Everything that can be checked before a process is started.

    Raises CheckpointError, or InvalidArgument that names the setting.
    """
    folder = Path(settings.model) if settings.model is not None else DEMO_MODEL
    shape = describe_model(open_checkpoint(folder))
    check_counts(settings, shape)
    _check_ports(settings)
    return CheckedModel(folder.resolve(), shape)


@contextlib.asynccontextmanager
async def running_cluster(
    settings: Settings, model: CheckedModel, progress: LoadProgress, signals: StopSignals
) -> AsyncIterator[Endpoints]:
    """A cluster that answers. Raises StopRequested when a signal comes before it does, Unavailable when it cannot."""
    from cluster.actors import RayCluster  # ray takes its time: a wrong flag is told before

    with contextlib.redirect_stdout(sys.stderr):
        ray = RayCluster.connect(
            settings, num_processes=NUM_OTHER_PROCESSES + (settings.cluster.workers or 1)
        )
        signals.install()
        try:
            processes = draw_blueprint(settings, model.folder, model.shape, ray.nodes(), ray.home)
            launcher = Launcher(ray, processes, settings)
            try:
                launcher.submit()
                with progress:
                    endpoints = await signals.unless_stopped(launcher.wait_ready(progress.show))
                yield endpoints
            finally:
                await launcher.stop(signals.force)
        finally:
            ray.close()


async def serve(settings: Settings, model: CheckedModel, *, as_json: bool) -> None:
    """Serves until a signal asks to stop; running requests may end within `cluster.drain_timeout_s`."""
    out, console = sys.stdout, Console(stderr=True)
    with StopSignals() as signals:
        async with running_cluster(settings, model, LoadProgress(console), signals) as endpoints:
            print(_ready_line(endpoints, as_json=as_json), file=out, flush=True)
            await signals.stop.wait()
            console.print("stopping: running requests may end; once more to stop at once", highlight=False)


def _ready_line(endpoints: Endpoints, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"ready": {"http": endpoints.http, "grpc": endpoints.grpc}})
    return f"ready http={endpoints.http} grpc={endpoints.grpc}"


def _check_ports(settings: Settings) -> None:
    """Tells a taken port before anything runs; the servers themselves bind later and would tell it too."""
    ports = {"http_port": settings.http_port, "grpc_port": settings.grpc_port}
    if settings.http_port and settings.http_port == settings.grpc_port:
        raise InvalidArgument("grpc_port: must differ from http_port", field="grpc_port")
    for field, port in ports.items():
        try:
            _bind(settings.host, port)
        except OSError as error:
            problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise InvalidArgument(f"{field}: {settings.host}:{port} {problem}", field=field) from error


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)

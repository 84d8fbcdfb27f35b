"""`python -m cluster.control`: a controller by hand, for workers that were started by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from cluster.control.control_plane import ControlPlane
from cluster.control.controller import Cluster, Member
from cluster.control.named_workers import NamedWorkers
from cluster.control.rollout_config import RolloutConfig
from cluster.control.server import ControlServer
from moesaic import telemetry
from moesaic.addresses import split_address
from moesaic.bundles import BaseModel
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import exit_with_code
from moesaic.families import describe_model
from moesaic.options import SettingFlags, run_program, with_settings
from moesaic.private_folder import private_folder
from moesaic.settings import Settings
from moesaic.stop_signals import serve_until_signal
from moesaic.v1 import control_pb2


@with_settings(
    "host",
    "dense_layers",
    "cluster.state",
    "cluster.signers",
    "cluster.replicas",
    "rollout.drain_s",
    "rollout.golden_prompts",
)
def main(
    model: Annotated[Path, typer.Option(help="The folder of the model.")],
    workers: Annotated[str, typer.Option(help="HOST:PORT of every expert worker, comma-separated.")],
    *,
    port: Annotated[
        int, typer.Option(help="The port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    flags: SettingFlags,
) -> None:
    """Command what the model is, for routers that follow this controller (`python -m router --control HOST:PORT`).

    Prints `ready grpc=HOST:PORT` when it listens. Workers may be started before or after it.
    """
    with exit_with_code(spell=flags.spell):
        try:
            settings = flags.load(model=str(model))
            telemetry.configure(
                "controller", otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level
            )
            with private_folder() as temporary:
                plane = _plane(settings, model, _addresses(workers), temporary)
                asyncio.run(_serve(plane, settings.host, port))
        finally:
            telemetry.flush()


def _addresses(workers: str) -> tuple[str, ...]:
    addresses = tuple(filter(None, map(str.strip, workers.split(","))))
    for address in addresses:
        split_address(address, "workers")
    if not addresses or len(set(addresses)) < len(addresses):
        raise InvalidArgument("workers: must name different workers", field="workers")
    return addresses


def _plane(settings: Settings, folder: Path, workers: tuple[str, ...], temporary: Path) -> ControlPlane:
    checkpoint = open_checkpoint(folder)
    described = describe_model(checkpoint, settings.dense_layers)
    base = BaseModel(FolderIdentity.of(checkpoint).fingerprint, described)
    cluster = Cluster(
        folder.resolve().name,
        frozenset(described.addresses),
        tuple(Member(address, control_pb2.PROCESS_ROLE_EXPERT_WORKER) for address in workers),
        base.fingerprint,
    )
    return ControlPlane(cluster, RolloutConfig.of(settings, base, temporary), NamedWorkers())


async def _serve(plane: ControlPlane, host: str, port: int) -> None:
    server = ControlServer(plane, host, port)

    async def start() -> None:
        address = await server.start()
        await server.load()
        typer.echo(f"ready grpc={address}")

    await serve_until_signal(start(), lambda: server.stop(0.0))


if __name__ == "__main__":
    run_program(main)

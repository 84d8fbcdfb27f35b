"""`python -m router`: one router by hand, with named workers or a controller to follow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from moesaic import telemetry
from moesaic.addresses import split_address
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import exit_with_code
from moesaic.families import DenseLayers, describe_model
from moesaic.garbage import lasting_imports
from moesaic.options import SettingFlags, run_program, with_settings
from moesaic.settings import Settings
from moesaic.stop_signals import serve_until_signal
from router.config import RouterConfig
from router.control.cluster_watch import ClusterView, ControlWatch, NamedWorkers


@with_settings(
    "served_model_name",
    "host",
    "device",
    "dtype",
    "dense_layers",
    "engine.max_model_len",
    "engine.generation_config",
    "engine.on_missing",
    "engine.threads",
    "engine.decoder",
    "engine.wire_dtype",
    "engine.combine",
    "engine.shared_memory",
    "engine.direct_stream",
    "engine.overlap",
    "engine.batch_invariant",
    port="grpc_port",
)
def main(
    model: Annotated[Path, typer.Option(help="The folder of the model.")],
    *,
    worker: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of an expert worker; repeat it.")
    ] = None,
    control: Annotated[
        str | None, typer.Option("--controller", "--control", help="HOST:PORT of a controller to follow.")
    ] = None,
    flags: SettingFlags,
) -> None:
    """Serve a model whose experts other processes serve, until a signal.

    Prints `ready grpc=HOST:PORT` when it answers.
    """
    with exit_with_code(spell=flags.spell):
        settings = flags.load(model=str(model))
        served_name = settings.served_model_name or model.resolve().name
        view = _view(model, settings.dense_layers, worker or [], control)
        try:
            asyncio.run(_serve(settings, model, served_name, view))
        finally:
            telemetry.flush()


def _view(model: Path, dense_layers: DenseLayers, workers: list[str], control: str | None) -> ClusterView:
    """Where the experts are. A model without experts needs neither workers nor a controller."""
    either = "name either workers (--worker) or a controller (--controller)"
    for worker in workers:
        split_address(worker, "worker")
    if control is not None:
        split_address(control, "controller")
        if workers:
            raise InvalidArgument(either, field="worker")
        address = control

        async def resolve() -> str:
            return address

        return ControlWatch(resolve)
    experts = describe_model(open_checkpoint(model), dense_layers).addresses
    if experts and not workers:
        raise InvalidArgument(either, field="worker")
    return NamedWorkers(workers, model=model.resolve().name, experts=experts)


async def _serve(settings: Settings, model: Path, served_name: str, view: ClusterView) -> None:
    # Imports torch and transformers, which take seconds: a wrong flag is reported before.
    with lasting_imports():
        from router.server import RouterServer

    telemetry.configure("router", otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level)
    server = RouterServer(
        RouterConfig(
            model=model,
            served_name=served_name,
            host=settings.host,
            port=settings.grpc_port,
            device=settings.device,
            dtype=settings.dtype,
            engine=settings.engine,
            dense_layers=settings.dense_layers,
        ),
        view,
    )

    async def start() -> None:
        address = await server.start()
        await server.load()
        await server.wait_ready(settings.cluster.start_timeout_s)
        typer.echo(f"ready grpc={address}")

    await serve_until_signal(start(), lambda: server.stop(settings.cluster.drain_timeout_s))


if __name__ == "__main__":
    run_program(main)

"""`python -m expert_worker`: one worker by hand, without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from expert_worker.config import WorkerConfig
from expert_worker.experts.expert_ranges import parse_experts
from moesaic import telemetry
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument
from moesaic.exit_codes import exit_with_code
from moesaic.families import describe_model
from moesaic.garbage import lasting_imports
from moesaic.options import SettingFlags, run_program, with_settings
from moesaic.settings import Settings
from moesaic.stop_signals import serve_until_signal


@with_settings(
    "host",
    "device",
    "dtype",
    "dense_layers",
    "worker.expert_dtype",
    "worker.batch_invariant",
    "worker.shared_memory",
    "worker.direct_stream",
    "worker.threads",
    "worker.keep_weights",
    "worker.keep_weights_in",
    "worker.keep_weights_mib",
)
def main(
    *,
    model: Annotated[str | None, typer.Option(help="The folder of the model.")] = None,
    experts: Annotated[
        str, typer.Option(help="[LAYERS:]SLOTS, comma-separated: 0-3, or 0:0-7,1:2; all for everything.")
    ] = "all",
    port: Annotated[
        int, typer.Option(help="The port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    name: Annotated[
        str, typer.Option(help="The name of this worker in the cluster.", show_default="HOSTNAME:PORT")
    ] = "",
    flags: SettingFlags,
) -> None:
    """Serve some experts of a model until a signal. Prints `ready grpc=HOST:PORT` when they are loaded."""
    with exit_with_code(spell=flags.spell):
        try:
            settings = flags.load(model=model)
            telemetry.configure(
                name or "expert-worker", otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level
            )
            config = _worker_config(settings, name, experts, port)
            asyncio.run(_serve(config, settings.cluster.drain_timeout_s))
        finally:
            telemetry.flush()


def _worker_config(settings: Settings, name: str, experts: str, port: int) -> WorkerConfig:
    if settings.model is None:
        raise InvalidArgument("model: is missing", field="model")
    model = describe_model(open_checkpoint(settings.model), settings.dense_layers)
    return WorkerConfig(
        name=name,
        model=Path(settings.model),
        experts=parse_experts(experts, model.num_slots),
        host=settings.host,
        port=port,
        device=settings.device,
        dtype=settings.dtype,
        settings=settings.worker,
        dense_layers=settings.dense_layers,
    )


async def _serve(config: WorkerConfig, drain_s: float) -> None:
    # Imports torch, which takes a second: a wrong flag is reported before.
    with lasting_imports():
        from expert_worker.server import WorkerServer

    server = WorkerServer(config)

    async def start() -> None:
        address = await server.start()
        await server.load()
        typer.echo(f"ready grpc={address}")

    await serve_until_signal(start(), lambda: server.stop(drain_s))


if __name__ == "__main__":
    run_program(main)

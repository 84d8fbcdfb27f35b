"""`python -m expert_worker`: one worker by hand, without Ray."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from expert_worker.config import WorkerConfig
from expert_worker.experts.expert_ranges import parse_experts
from expert_worker.server import WorkerServer
from moesaic import telemetry
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument, MoesaicError
from moesaic.families import describe_model
from moesaic.settings import Settings, load_settings

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="Folder of a model.")] = None,
    experts: Annotated[
        str, typer.Option(help="[LAYERS:]SLOTS, comma-separated: 0-3, or 0:0-7,1:2; all for everything.")
    ] = "all",
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="auto, router or experts: who computes layers without a gate.")
    ] = None,
    expert_dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16, int8 or int4; auto: as --dtype says.")
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option(
            "--batch-invariant", help="A row's answer does not depend on the rows beside it. Slower."
        ),
    ] = None,
    shared_memory: Annotated[
        str | None, typer.Option(help="auto or off: shared memory with routers on this host.")
    ] = None,
    direct_stream: Annotated[
        str | None, typer.Option(help="auto or off: a port at which the compute thread itself serves gRPC.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of this worker in the cluster.")] = "worker-0",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML.")] = None,
) -> None:
    """Serves some experts of a model until SIGTERM; prints `ready grpc=HOST:PORT` when they are loaded."""
    try:
        worker = {
            "threads": threads,
            "expert_dtype": expert_dtype,
            "batch_invariant": batch_invariant,
            "shared_memory": shared_memory,
            "direct_stream": direct_stream,
        }
        settings = load_settings(
            config,
            model=model,
            host=host,
            device=device,
            dtype=dtype,
            dense_layers=dense_layers,
            worker=worker,
        )
        telemetry.configure(name, otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level)
        asyncio.run(_serve(_worker_config(settings, name, experts, port), settings.cluster.drain_timeout_s))
    except MoesaicError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(error.exit_code) from None
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
    """Until a signal; one that comes while the weights load ends that, too."""
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    server = WorkerServer(config)
    address = await server.start()
    loading = asyncio.create_task(server.load())
    waiting = asyncio.create_task(signalled.wait())
    try:
        await asyncio.wait((loading, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not signalled.is_set():
            await loading
            typer.echo(f"ready grpc={address}")
            await waiting
    finally:
        waiting.cancel()
        await server.stop(drain_s)
        # After a signal, that the loading was stopped is no error.
        await asyncio.gather(loading, return_exceptions=True)


if __name__ == "__main__":
    app()

"""`python -m router`: a router by hand, with workers named by hand or a controller to follow."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic import telemetry
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument, MoesaicError
from moesaic.families import DenseLayers, describe_model
from moesaic.settings import Settings, load_settings
from router.config import RouterConfig
from router.control.cluster_watch import ClusterView, ControlWatch, NamedWorkers

if TYPE_CHECKING:
    from router.server import RouterServer


def main(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    worker: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of an expert worker; repeat it.")
    ] = None,
    control: Annotated[str | None, typer.Option(help="HOST:PORT of a controller.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API.")] = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option(help="0: any free port.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="auto, router or experts: who computes layers without a gate.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="auto, lean (our own decoder) or hf (the modules of transformers)."),
    ] = None,
    wire_dtype: Annotated[
        str | None, typer.Option(help="Rows on the wire: auto, float32, bfloat16 or int8.")
    ] = None,
    combine: Annotated[
        str | None,
        typer.Option(help="rows, or sum: workers add up, fewer bytes, placement shows in last bits."),
    ] = None,
    shared_memory: Annotated[
        str | None, typer.Option(help="auto or off: shared memory with workers on this host.")
    ] = None,
    direct_stream: Annotated[
        str | None, typer.Option(help="auto or off: gRPC to workers by the threads that compute.")
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="on or off: two micro-batches in flight, so that router and workers compute at once."
        ),
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option(
            "--batch-invariant", help="A sequence's tokens do not depend on its batch mates. Slower."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
) -> None:
    """Serves a model whose experts are served elsewhere."""
    try:
        settings = load_settings(
            config,
            model=str(model),
            served_model_name=served_model_name,
            host=host,
            grpc_port=port,
            device=device,
            dtype=dtype,
            dense_layers=dense_layers,
            engine={
                "max_model_len": max_model_len,
                "threads": threads,
                "decoder": decoder,
                "wire_dtype": wire_dtype,
                "combine": combine,
                "shared_memory": shared_memory,
                "direct_stream": direct_stream,
                "overlap": overlap,
                "batch_invariant": batch_invariant,
            },
        )
        served_name = settings.served_model_name or model.resolve().name
        view = _view(model, settings.dense_layers, worker or [], control)
        asyncio.run(_serve(settings, model, served_name, view))
    except MoesaicError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(error.exit_code) from error


def _view(model: Path, dense_layers: DenseLayers, workers: list[str], control: str | None) -> ClusterView:
    """A model without experts needs neither."""
    either = "name either workers (--worker) or a controller (--control)"
    if control is not None:
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
    # Heavy: torch and transformers. A wrong flag is told before.
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
    stopping = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stopping.set)
    ready = asyncio.create_task(_become_ready(server, settings.cluster.start_timeout_s))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        await stop
    finally:
        ready.cancel()
        stop.cancel()
        await server.stop(settings.cluster.drain_timeout_s)
        telemetry.flush()


async def _become_ready(server: RouterServer, timeout_s: float) -> None:
    address = await server.start()
    await server.load()
    await server.wait_ready(timeout_s)
    typer.echo(f"ready grpc={address}")


if __name__ == "__main__":
    typer.run(main)

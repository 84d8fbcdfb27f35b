"""`python -m gateway --router HOST:PORT`: the OpenAI API in front of one router or several, started by hand."""

from __future__ import annotations

import asyncio
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from moesaic import telemetry
from moesaic.errors import MoesaicError
from moesaic.settings import Settings, load_settings


def main(
    router: Annotated[list[str], typer.Option(help="HOST:PORT of a router. Repeatable.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients may call this server by. Repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
) -> None:
    """Serves HTTP until SIGTERM or Ctrl-C, then lets running requests end."""
    try:
        settings = load_settings(config, host=host, http_port=port, gateway={"allowed_hosts": allowed_host})
        telemetry.configure("gateway", otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level)
        asyncio.run(_serve(router, settings))
    except MoesaicError as error:
        print(f"error: {error.message}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    finally:
        telemetry.flush()


async def _serve(routers: list[str], settings: Settings) -> None:
    config = GatewayConfig(settings.host, settings.http_port, settings.gateway)
    server = GatewayServer(config, {address: partial(_itself, address) for address in routers})
    stopping = _stop_signal()
    print(f"listening http={await server.start()} router={','.join(routers)}", flush=True)
    await stopping.wait()
    await server.stop(settings.cluster.drain_timeout_s)


async def _itself(address: str) -> str:
    """The lookup of a router whose address was given by hand."""
    return address


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


if __name__ == "__main__":
    typer.run(main)

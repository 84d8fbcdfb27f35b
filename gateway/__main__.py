"""`python -m gateway --router HOST:PORT`: the OpenAI API in front of one or several routers, by hand."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import typer

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from moesaic import telemetry
from moesaic.addresses import split_address
from moesaic.exit_codes import exit_with_code
from moesaic.options import SettingFlags, run_program, with_settings
from moesaic.settings import Settings
from moesaic.stop_signals import serve_until_signal


@with_settings(
    "host", port="http_port", allowed_host="gateway.allowed_hosts", allowed_origin="gateway.allowed_origins"
)
def main(
    router: Annotated[list[str], typer.Option(help="HOST:PORT of a router; repeat it.")],
    *,
    flags: SettingFlags,
) -> None:
    """Serve HTTP until a signal, then let running requests end. Prints `listening http=HOST:PORT`."""
    with exit_with_code(spell=flags.spell):
        try:
            settings = flags.load()
            for address in router:
                split_address(address, "router")
            telemetry.configure("gateway", otlp_endpoint=settings.otlp_endpoint, log_level=settings.log_level)
            asyncio.run(_serve(router, settings))
        finally:
            telemetry.flush()


async def _serve(routers: list[str], settings: Settings) -> None:
    config = GatewayConfig(settings.host, settings.http_port, settings.gateway)
    server = GatewayServer(config, {address: partial(_itself, address) for address in routers})

    async def start() -> None:
        print(f"listening http={await server.start()} router={','.join(routers)}", flush=True)

    await serve_until_signal(start(), lambda: server.stop(settings.cluster.drain_timeout_s))


async def _itself(address: str) -> str:
    """Resolves a router that was named by its address."""
    return address


if __name__ == "__main__":
    run_program(main)

"""The address at which a verb finds its server: the flag's, or that of `moesaic serve` with the same settings."""

from __future__ import annotations

from moesaic.addresses import EVERY_IPV4, EVERY_IPV6, join_address, split_address
from moesaic.errors import InvalidArgument
from moesaic.settings import Settings

# A server that listens on every address of its machine is asked over loopback.
_LOOPBACK = {EVERY_IPV4: "127.0.0.1", EVERY_IPV6: "::1"}


def router_address(grpc: str | None, settings: Settings) -> str:
    """HOST:PORT. Raises InvalidArgument with field `grpc`, or `grpc_port` where the settings name no port."""
    if grpc is not None:
        return join_address(*split_address(grpc, "grpc"))
    if not settings.grpc_port:
        raise InvalidArgument("grpc_port: names no port to ask: give --grpc HOST:PORT", field="grpc_port")
    return join_address(_LOOPBACK.get(settings.host, settings.host), settings.grpc_port)

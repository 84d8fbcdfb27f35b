"""The address at which a verb finds its server: the flag's, or that of `moesaic serve` with the same settings."""

from __future__ import annotations

from moesaic.errors import InvalidArgument
from moesaic.settings import Settings

# A server that listens on every address of its machine is asked over loopback.
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def router_address(grpc: str | None, settings: Settings) -> str:
    """HOST:PORT. Raises InvalidArgument with field `grpc`, or `grpc_port` where the settings name no port."""
    if grpc is not None:
        return _checked(grpc)
    if not settings.grpc_port:
        raise InvalidArgument("grpc_port: names no port to ask: give --grpc HOST:PORT", field="grpc_port")
    host = _EVERY_ADDRESS.get(settings.host, settings.host)
    return f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InvalidArgument("grpc: must be HOST:PORT, without http://", field="grpc")
    return address

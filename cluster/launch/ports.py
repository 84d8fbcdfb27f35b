"""The addresses of `--host`, `--http-port` and `--grpc-port`, settled before anything runs."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from typing import Any

from moesaic.addresses import join_address
from moesaic.errors import InvalidArgument
from moesaic.settings import Settings

# Ports above those that Ray gives its workers and below those that Linux assigns by itself, so that neither
# takes one while the processes start.
QUIET_PORTS = range(20_000, 32_768)
NUM_CANDIDATES = 64
_HOSTS = "127.0.0.1 is this machine alone, 0.0.0.0 every address of it"

# A family of addresses, and an address of it as sockets take them.
_Found = tuple[socket.AddressFamily, tuple[Any, ...]]


def with_ports(settings: Settings) -> Settings:
    """The settings with a free port in place of 0, so that a restarted server has the address of the ready line.

    Raises InvalidArgument for a port that is taken, and for a host that is not this machine's.
    """
    if settings.http_port and settings.http_port == settings.grpc_port:
        raise InvalidArgument("grpc_port: must differ from http_port", field="grpc_port")
    found = _resolve(settings.host)
    with contextlib.ExitStack() as probes:  # both are held, so that two free ports differ
        ports = {
            field: _bind(field, settings.host, port, found, probes)
            for field, port in (("http_port", settings.http_port), ("grpc_port", settings.grpc_port))
        }
    return settings.model_copy(update=ports)


def _resolve(host: str) -> _Found:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(
            f"host: {host!r} is no address and no name that can be resolved: {_HOSTS}", field="host"
        ) from error
    return family, address


def _bind(field: str, host: str, port: int, found: _Found, probes: contextlib.ExitStack) -> int:
    """Binds the port, or for 0 a free one of QUIET_PORTS, and returns it."""
    family, (name, _, *scope) = found
    refusal: OSError | None = None
    for candidate in [port] if port else random.sample(QUIET_PORTS, NUM_CANDIDATES):
        try:
            probe = probes.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((name, candidate, *scope))
            return candidate
        except OSError as error:
            refusal = error
    assert refusal is not None
    raise _refused(field, host, port, refusal) from refusal


def _refused(field: str, host: str, port: int, refusal: OSError) -> InvalidArgument:
    address = join_address(host, port)
    match refusal.errno:
        case errno.EADDRINUSE:
            return InvalidArgument(f"{field}: {address} is in use; 0 takes a free port", field=field)
        case errno.EACCES:
            return InvalidArgument(f"{field}: {address} needs root; choose a port above 1023", field=field)
        case _:
            return InvalidArgument(
                f"host: {host} is no address of this machine ({refusal.strerror}): {_HOSTS}", field="host"
            )

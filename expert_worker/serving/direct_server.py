"""The port at which the compute thread itself speaks gRPC, for callers of any host: a door for their connections.

It serves Compute and nothing else; everything else, and messages that are larger, go to the main server.
"""

from __future__ import annotations

import logging
import socket

from expert_worker.compute.batcher import Batcher
from expert_worker.serving.call_handler import CallDesk
from expert_worker.serving.direct_connection import DirectConnection
from expert_worker.serving.listener import Entrance
from moesaic.transports import tcp_socket as direct

log = logging.getLogger(__name__)

# One for every router that a cluster may have, each with a stream: whoever has none goes when there is no place left.
MAX_CONNECTIONS = 64
_EVERY_ADDRESS = ("0.0.0.0", "::")


class DirectDoor:
    """Until `open`, and where there can be none, `port` is 0."""

    def __init__(self, desk: CallDesk, *, host: str) -> None:
        self.port = 0
        self._desk = desk
        self._host = host
        self._entrance: Entrance
        self._batcher: Batcher
        self._connections: set[DirectConnection] = set()

    def is_idle(self) -> bool:
        """Whether every call that was taken is answered, and every answer on its way."""
        return all(connection.is_idle() for connection in list(self._connections))

    def open(self, batcher: Batcher) -> None:
        """Lets callers in; `batcher` reads and computes their calls."""
        self._batcher = batcher
        try:
            listening = _listen(self._host)
        except OSError:
            log.warning("no port of the compute thread: calls take the main one", exc_info=True)
            return
        self.port = listening.getsockname()[1]
        self._entrance = Entrance(listening)
        batcher.attach(self)

    def close(self) -> None:
        """Comes at the end of the batcher."""
        self.port = 0
        self._batcher.detach(self)
        self._entrance.close()

    def fileno(self) -> int:
        return self._entrance.fileno()

    def read(self) -> None:
        """Lets one caller in."""
        accepted = self._entrance.accept()
        if accepted is None:
            return
        if not self._has_place():
            accepted.close()
            return
        try:
            direct.prepare_socket(accepted)
        except OSError:  # it is gone already
            accepted.close()
            return
        made = DirectConnection(accepted, self._desk, self._batcher, self._connections.discard)
        self._connections.add(made)
        made.greet()

    def _has_place(self) -> bool:
        """For one more, who takes the place of one that has no stream, if that is needed."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        unused = next((held for held in self._connections if not held.is_used), None)
        if unused is not None:
            unused.close()
        return unused is not None


def _listen(host: str) -> socket.socket:
    """A free port at the address of the main server. Raises OSError."""
    address = host.strip("[]")
    if address in _EVERY_ADDRESS and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return _listen_at(address)


def _listen_at(name: str) -> socket.socket:
    """At the first address of this name that is to be had: whoever connects tries them all."""
    found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found[:-1]:
        try:
            return socket.create_server(address, family=family)
        except OSError:
            continue
    family, _, _, _, address = found[-1]
    return socket.create_server(address, family=family)

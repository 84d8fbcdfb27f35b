"""The port at which the compute thread itself serves gRPC, for callers on any host.

It serves Compute and nothing else; other methods, and larger messages, go to the main server.
"""

from __future__ import annotations

import logging
import socket

from expert_worker.compute.batcher import Batcher
from expert_worker.serving.call_handler import CallHandler
from expert_worker.serving.direct_connection import DirectConnection
from expert_worker.serving.listener import Listener
from moesaic.transports import tcp_socket

log = logging.getLogger(__name__)

# One for every router that a cluster may have, each with a stream open. At the limit a new connection
# replaces one that has no stream.
MAX_CONNECTIONS = 64
_EVERY_ADDRESS = ("0.0.0.0", "::")


class DirectServer:
    """`port` is 0 before `open`, and where no port could be opened."""

    def __init__(self, handler: CallHandler, *, host: str) -> None:
        self.port = 0
        self._handler = handler
        self._host = host
        self._listener: Listener
        self._batcher: Batcher
        self._connections: set[DirectConnection] = set()

    def is_idle(self) -> bool:
        """Whether every accepted call is answered and every answer given to its socket."""
        return all(connection.is_idle() for connection in list(self._connections))

    def open(self, batcher: Batcher) -> None:
        """Starts listening; `batcher` reads and computes the calls."""
        self._batcher = batcher
        try:
            listening = _listen(self._host)
        except OSError:
            log.warning("no port of the compute thread: calls take the main one", exc_info=True)
            return
        self.port = listening.getsockname()[1]
        self._listener = Listener(listening)
        batcher.attach(self)

    def close(self) -> None:
        """Called when the batcher ends."""
        self.port = 0
        self._batcher.detach(self)
        self._listener.close()

    def fileno(self) -> int:
        return self._listener.fileno()

    def read(self) -> None:
        """Accepts one connection."""
        client = self._listener.accept()
        if client is None:
            return
        if not self._make_room():
            client.close()
            return
        try:
            tcp_socket.prepare_socket(client)
        except OSError:  # it is gone already
            client.close()
            return
        connection = DirectConnection(client, self._handler, self._batcher, self._connections.discard)
        self._connections.add(connection)
        connection.send_preface()

    def _make_room(self) -> bool:
        """Whether one more connection can be accepted, closing one without a stream if that is needed."""
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
    """Listens at the first address of the name that is available; callers try all of them."""
    found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found[:-1]:
        try:
            return socket.create_server(address, family=family)
        except OSError:
            continue
    family, _, _, _, address = found[-1]
    return socket.create_server(address, family=family)

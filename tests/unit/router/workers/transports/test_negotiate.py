"""Which transports are opened beside the grpcio stream, and that a worker that offers none is left with that."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest

from moesaic.routing_table import Replica
from moesaic.transports.grpc_connection import GrpcConnection, StreamOpened
from moesaic.transports.tcp_socket import MAX_MESSAGE_BYTES
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD
from router.workers.transports import direct_stream
from router.workers.transports.base import Transport, TransportKind
from router.workers.transports.direct_stream import DirectStream
from router.workers.transports.negotiate import open_transports

WAIT_S = 60.0


class Stub:
    """A worker that answers OpenTransports."""

    def __init__(self, **answer: Any) -> None:
        self.asked: list[expert_pb2.OpenTransportsRequest] = []
        self._answer = expert_pb2.OpenTransportsResponse(**{"incarnation": "a-1"} | answer)

    def OpenTransports(
        self, request: expert_pb2.OpenTransportsRequest, timeout: float
    ) -> expert_pb2.OpenTransportsResponse:
        self.asked.append(request)
        return self._answer


class OldStub:
    def OpenTransports(self, request: expert_pb2.OpenTransportsRequest, timeout: float) -> None:
        raise grpc.RpcError


def opened(
    stub: Any, host: str = "127.0.0.1", *, use_shared_memory: bool = False, use_direct: bool = True
) -> dict[TransportKind, Transport]:
    return open_transports(
        stub,
        Replica("a", f"{host}:1", "a-1", frozenset()),
        use_shared_memory=use_shared_memory,
        use_direct=use_direct,
    )


@contextmanager
def port_of(
    answer: Callable[[socket.socket], object], host: str = "127.0.0.1", *, reads_on: bool = True
) -> Iterator[int]:
    """A port at which one caller is let in and answered; that port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(ConnectionResetError):
                connection.settimeout(WAIT_S)
                answer(connection)
                while reads_on and connection.recv(4096):
                    pass

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield listening.getsockname()[1]
        finally:
            serving.join(WAIT_S)
            assert not serving.is_alive()


def answer_preface(connection: socket.socket) -> None:
    peer = GrpcConnection(client=False, max_message_bytes=MAX_MESSAGE_BYTES)
    connection.sendall(peer.take_outgoing())
    events = peer.receive(connection.recv(4096))
    assert [event.method for event in events if isinstance(event, StreamOpened)] == [COMPUTE_METHOD]


def take_one(opened: dict[TransportKind, Transport]) -> None:
    (transport,) = opened.values()
    assert isinstance(transport, DirectStream) and not transport.broken
    transport.close()


def test_a_direct_stream_is_opened_at_the_port_that_the_worker_names() -> None:
    with port_of(answer_preface) as port:
        take_one(opened(Stub(direct_port=port)))


def test_a_host_is_reached_by_its_name() -> None:
    with port_of(answer_preface) as port:
        take_one(opened(Stub(direct_port=port), "localhost"))


def test_a_host_is_reached_at_an_address_of_ip_6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with port_of(answer_preface, "::1") as port:
        take_one(opened(Stub(direct_port=port), "[::1]"))


def test_a_port_that_refuses_leaves_no_transport() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert opened(Stub(direct_port=port)) == {}


def test_a_port_behind_which_nobody_speaks_leaves_no_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_stream, "CONNECT_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert opened(Stub(direct_port=listening.getsockname()[1])) == {}


def test_a_port_at_which_another_protocol_is_spoken_leaves_no_transport() -> None:
    refusal = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with port_of(lambda connection: connection.sendall(refusal), reads_on=False) as port:
        assert opened(Stub(direct_port=port)) == {}


def test_a_host_that_has_no_address_leaves_no_transport() -> None:
    assert opened(Stub(direct_port=1), "no.such.host.invalid") == {}


def test_a_socket_that_cannot_be_opened_leaves_no_transport() -> None:
    assert opened(Stub(socket_path="/nowhere/rows.sock"), use_shared_memory=True) == {}


def test_another_incarnation_at_the_address_is_left_alone() -> None:
    assert (
        opened(Stub(incarnation="a-2", direct_port=1, socket_path="/nowhere"), use_shared_memory=True) == {}
    )


def test_a_worker_that_knows_no_other_transports_has_none() -> None:
    assert opened(Stub()) == opened(OldStub()) == {}


def test_what_is_off_is_not_opened_and_the_worker_is_asked_once_for_all() -> None:
    stub = Stub(direct_port=1, socket_path="/nowhere")
    assert opened(stub, use_direct=False) == {}
    assert [request.host_id for request in stub.asked] == [""]

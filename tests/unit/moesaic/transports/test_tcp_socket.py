"""The sockets of a direct stream."""

from __future__ import annotations

import errno
import select
import socket
import sys
from contextlib import suppress

import pytest

from moesaic.transports import tcp_socket


def option(connection: socket.socket, name: str) -> int:
    if not hasattr(socket, name):
        pytest.skip(f"this system knows no {name}")
    return connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))


def test_a_host_that_vanished_is_noticed_in_time_whether_or_not_something_is_under_way() -> None:
    with socket.socket() as connection:
        tcp_socket.prepare_socket(connection)
        assert not connection.getblocking()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(connection, "TCP_USER_TIMEOUT") == tcp_socket.GONE_AFTER_S * 1000
        quiet_s, period_s = option(connection, "TCP_KEEPIDLE"), option(connection, "TCP_KEEPINTVL")
        assert quiet_s + period_s * option(connection, "TCP_KEEPCNT") == tcp_socket.GONE_AFTER_S


def test_a_connection_that_is_closed_cannot_be_prepared() -> None:
    with socket.socket() as connection:
        connection.close()
        with pytest.raises(OSError):
            tcp_socket.prepare_socket(connection)


class Acknowledged(socket.socket):
    """A connection whose other end acknowledged something so long ago."""

    milliseconds_ago = 0

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return bytes(56) + self.milliseconds_ago.to_bytes(4, sys.byteorder)


def test_a_host_that_answers_nothing_is_told_apart_from_one_that_refuses() -> None:
    with Acknowledged() as connection:
        connection.milliseconds_ago = 5100
        assert tcp_socket.is_silence(TimeoutError(errno.ETIMEDOUT, "timed out"), connection)
        assert tcp_socket.is_silence(OSError(errno.EHOSTUNREACH, "no route"), connection)
        assert not tcp_socket.is_silence(ConnectionResetError(errno.ECONNRESET, "reset"), connection)


def test_a_host_that_acknowledged_lately_is_not_silent_although_its_process_reads_nothing() -> None:
    with Acknowledged() as connection:
        connection.milliseconds_ago = 2016
        assert not tcp_socket.is_silence(TimeoutError(errno.ETIMEDOUT, "timed out"), connection)


def test_a_process_that_reads_nothing_for_long_does_not_make_its_host_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a kernel that is in a hurry."""
    hurried = [(name, 1000 if name == "TCP_USER_TIMEOUT" else value) for name, value in tcp_socket._OPTIONS]
    monkeypatch.setattr(tcp_socket, "_OPTIONS", hurried)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
    ):
        tcp_socket.prepare_socket(ours)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(1 << 20))
        poll = select.poll()
        poll.register(ours, select.POLLERR)
        assert poll.poll(60_000)
        with pytest.raises(TimeoutError) as given_up:
            ours.send(b"x")
        assert not tcp_socket.is_silence(given_up.value, ours)

"""The sockets of a direct stream."""

from __future__ import annotations

import errno
import socket

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


def test_a_host_that_answers_nothing_is_told_apart_from_one_that_refuses() -> None:
    assert tcp_socket.is_silence(TimeoutError(errno.ETIMEDOUT, "timed out"))
    assert tcp_socket.is_silence(OSError(errno.EHOSTUNREACH, "no route"))
    assert not tcp_socket.is_silence(ConnectionResetError(errno.ECONNRESET, "reset"))

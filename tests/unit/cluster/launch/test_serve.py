"""The ports of a cluster are settled before anything runs."""

from __future__ import annotations

import socket

import pytest

from cluster.launch.serve import QUIET_PORTS, with_ports
from moesaic.errors import InvalidArgument
from moesaic.settings import Settings


def test_port_0_becomes_two_ports_that_nobody_else_is_given() -> None:
    settings = with_ports(Settings(http_port=0, grpc_port=0))
    assert settings.http_port != settings.grpc_port
    assert {settings.http_port, settings.grpc_port} <= set(QUIET_PORTS)


def test_a_port_in_use_is_refused_by_its_field() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"127.0.0.1:{port} is in use") as refused:
            with_ports(Settings(http_port=port, grpc_port=0))
    assert refused.value.field == "http_port"


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot be used"):
        with_ports(Settings(host="203.0.113.1", http_port=0, grpc_port=0))

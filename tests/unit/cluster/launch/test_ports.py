"""The ports of a cluster are settled before anything runs."""

from __future__ import annotations

import socket

import pytest

from cluster.launch.ports import QUIET_PORTS, with_ports
from moesaic.errors import InvalidArgument
from moesaic.settings import Settings


def test_port_0_becomes_two_ports_that_nobody_else_is_given() -> None:
    settings = with_ports(Settings(http_port=0, grpc_port=0))
    assert settings.http_port != settings.grpc_port
    assert {settings.http_port, settings.grpc_port} <= set(QUIET_PORTS)


def test_a_port_in_use_is_refused_by_its_field_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"127.0.0.1:{port} is in use; 0 takes a free") as refused:
            with_ports(Settings(http_port=port, grpc_port=0))
    assert refused.value.field == "http_port"


@pytest.mark.parametrize("port", [0, 18_000])
def test_a_host_of_another_machine_is_the_hosts_fault(port: int) -> None:
    with pytest.raises(
        InvalidArgument, match=r"host: 203\.0\.113\.1 is no address of this machine"
    ) as refused:
        with_ports(Settings(host="203.0.113.1", http_port=port, grpc_port=0))
    assert refused.value.field == "host"


# None of them reaches a name server.
@pytest.mark.parametrize("host", ["no such host", "a" * 300, "x..y", "[::1"])
def test_a_host_that_cannot_be_resolved_is_the_hosts_fault(host: str) -> None:
    with pytest.raises(InvalidArgument, match="host: ") as refused:
        with_ports(Settings(host=host, http_port=0, grpc_port=0))
    assert refused.value.field == "host"


def test_an_address_of_ipv6_is_named_with_brackets() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no ::1")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=rf"\[::1\]:{port} is in use"):
            with_ports(Settings(host="::1", http_port=port, grpc_port=0))
        assert with_ports(Settings(host="::1", http_port=0, grpc_port=0)).http_port in QUIET_PORTS

"""HOST:PORT is joined and split in one way, IPv6 included."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from moesaic.addresses import address_for_callers, is_loopback, join_address, split_address
from moesaic.errors import InvalidArgument


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("node-3.local", "node-3.local:80"),
        ("::1", "[::1]:80"),
        ("[::1]", "[::1]:80"),
        ("::", "[::]:80"),
        ("fe80::1%eth0", "[fe80::1%eth0]:80"),
    ],
)
def test_an_address_is_written_as_in_a_url_and_read_back(host: str, address: str) -> None:
    assert join_address(host, 80) == address
    assert split_address(address) == (host.strip("[]"), 80)
    assert (urlsplit(f"//{address}").hostname, urlsplit(f"//{address}").port) == split_address(address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:x",
        "::1",
        "::1:80",
        "[::1]",
        "[]:80",
        "[host]:80",
        "host:70000",
        "h:²",
    ],
)
def test_what_is_no_address_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidArgument, match="worker: must be HOST:PORT") as refused:
        split_address(text, "worker")
    assert refused.value.field == "worker"


@pytest.mark.parametrize(
    ("listening", "node", "called"),
    [
        ("10.0.0.5:80", "10.0.0.9", "10.0.0.5:80"),
        ("[::1]:80", "127.0.0.1", "[::1]:80"),
        ("0.0.0.0:80", "10.0.0.9", "10.0.0.9:80"),
        ("0.0.0.0:80", "127.0.0.1", "127.0.0.1:80"),
        ("[::]:80", "10.0.0.9", "10.0.0.9:80"),
        ("[::]:80", "fd00::9", "[fd00::9]:80"),
        ("[::]:80", "127.0.0.1", "[::1]:80"),
    ],
)
def test_a_server_on_every_address_is_called_at_its_node(listening: str, node: str, called: str) -> None:
    assert address_for_callers(listening, node) == called


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_is_told_from_what_others_can_reach(host: str) -> None:
    assert is_loopback(host)
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "node-3.local")))

"""Addresses as HOST:PORT, with brackets around an IPv6 host: [::1]:8000."""

from __future__ import annotations

import ipaddress
import re

from moesaic.errors import InvalidArgument

# A server that listens on one of these listens on every address of its machine, and can be called at neither.
EVERY_IPV4 = "0.0.0.0"
EVERY_IPV6 = "::"
EVERY_ADDRESS = frozenset({EVERY_IPV4, EVERY_IPV6})
_MAX_PORT = 65_535
_MAX_SHOWN_CHARS = 200
# A name or an IPv4 address; neither is a part of a URL.
_HOST = re.compile(r"[^][:/@\s]+")


def join_address(host: str, port: int) -> str:
    """HOST:PORT of a host with or without brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str, field: str = "address") -> tuple[str, int]:
    """The host, without brackets, and the port. Raises InvalidArgument with `field`."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_host = is_ipv6(host[1:-1]) if is_bracketed else _HOST.fullmatch(host)
    if not is_host or not _is_port(port):
        raise InvalidArgument(
            f"{field}: must be HOST:PORT, or [HOST]:PORT for IPv6, not {address[:_MAX_SHOWN_CHARS]!r}",
            field=field,
        )
    return host.strip("[]"), int(port)


def address_for_callers(address: str, node: str) -> str:
    """The address at which a server of `node` can be called, from the one on which it listens."""
    host, port = split_address(address)
    if host not in EVERY_ADDRESS:
        return address
    # A loopback node listens on both kinds of loopback; ::1 is also there where :: does not include IPv4.
    return join_address("::1" if host == EVERY_IPV6 and node == "127.0.0.1" else node, port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can call a server that listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_ipv6(host: str) -> bool:
    """Whether a host without brackets is an IPv6 address."""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) <= _MAX_PORT

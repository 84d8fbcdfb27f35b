"""The addresses of routers as their client takes them: HOST:PORT, one or several."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from moesaic.errors import InvalidArgument

_EXAMPLE = "such as 127.0.0.1:50051"
_HOST_AND_PORT = re.compile(r"(?P<host>\[[^][]*\]|[^][:/@\s]+):(?P<port>[0-9]{1,5})")


class Targets:
    """The routers that a client may ask, and the one that it asks at present."""

    def __init__(self, target: str | Sequence[str]) -> None:
        """`target`: HOST:PORT, several with commas between, or a sequence. Raises InvalidArgument."""
        given = target.split(",") if isinstance(target, str) else list(target)
        self.addresses = tuple(dict.fromkeys(it.strip() if isinstance(it, str) else it for it in given))
        for address in self.addresses or ("",):
            check_target(address)
        self._present = 0

    @property
    def present(self) -> str:
        return self.addresses[self._present]

    def leave(self, address: str) -> None:
        """From now on another one is asked, unless a call that failed there before has seen to it."""
        if address == self.present:
            self._present = (self._present + 1) % len(self.addresses)


def check_target(target: str) -> None:
    """Raises InvalidArgument, which says how the address has to be written.

    gRPC itself would take a missing port for 443, and a URL for the name of a host.
    """
    problem = _problem(target)
    if problem:
        raise InvalidArgument(problem, field="target", reason="BAD_ADDRESS")


def _problem(target: str) -> str:
    if not isinstance(target, str) or not target.strip():
        return f"the address of the router is missing: give HOST:PORT, {_EXAMPLE}"
    if "://" in target:
        return f"{target} is a URL: give HOST:PORT of the router's gRPC service, {_EXAMPLE}"
    if _is_ipv6(target):
        return f"an IPv6 address stands in brackets, with its port after them: [{target}]:50051"
    match = _HOST_AND_PORT.fullmatch(target)
    if match is None:
        has_no_port = re.fullmatch(r"(\[[^][]*\]|[^][:/@\s]+):?", target)
        return (
            f"{target} has no port: give HOST:PORT, {_EXAMPLE}"
            if has_no_port
            else f"{target} is no address: give HOST:PORT, {_EXAMPLE}"
        )
    if not 1 <= int(match["port"]) <= 65535:
        return f"{target} has no valid port: it must be in [1, 65535]"
    if match["host"].startswith("[") and not _is_ipv6(match["host"][1:-1]):
        return f"{target} has no IPv6 address in its brackets"
    return ""


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True

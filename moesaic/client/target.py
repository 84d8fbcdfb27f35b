"""The addresses of routers as their client takes them, and what helps where one is written in another way."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.addresses import is_ipv6, split_address
from moesaic.errors import InvalidArgument

_EXAMPLE = "such as 127.0.0.1:50051"


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
    if not isinstance(target, str) or not target.strip():
        raise _refusal(f"the address of the router is missing: give HOST:PORT, {_EXAMPLE}")
    try:
        split_address(target)
    except InvalidArgument as error:
        raise _refusal(_problem(target)) from error


def _problem(target: str) -> str:
    if "://" in target:
        return f"{target} is a URL: give HOST:PORT of the router's gRPC service, {_EXAMPLE}"
    if is_ipv6(target):
        return f"an IPv6 address stands in brackets, with its port after them: [{target}]:50051"
    if _is_host(target.removesuffix(":")):
        return f"{target} has no port: give HOST:PORT, {_EXAMPLE}"
    host, _, port = target.rpartition(":")
    if _is_host(host) and port.isdecimal():
        return f"{target} has no valid port: it must be in [1, 65535]"
    if host.startswith("[") and host.endswith("]"):
        return f"{target} has no IPv6 address in its brackets"
    return f"{target} is no address: give HOST:PORT, {_EXAMPLE}"


def _is_host(text: str) -> bool:
    """Whether only a port is missing."""
    try:
        split_address(f"{text}:1")
    except InvalidArgument:
        return False
    return True


def _refusal(problem: str) -> InvalidArgument:
    return InvalidArgument(problem, field="target", reason="BAD_ADDRESS")

"""The address of a router as its client takes it, and what helps where it is written in another way."""

from __future__ import annotations

from moesaic.addresses import is_ipv6, split_address
from moesaic.errors import InvalidArgument

_EXAMPLE = "such as 127.0.0.1:50051"


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

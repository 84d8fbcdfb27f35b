"""How the address of a router has to be written."""

from __future__ import annotations

import pytest

from moesaic.client.target import Targets, check_target
from moesaic.errors import InvalidArgument


@pytest.mark.parametrize(
    "target", ["127.0.0.1:50051", "localhost:1", "router.example.org:65535", "[::1]:50051", "my_router:5"]
)
def test_host_and_port_are_taken(target: str) -> None:
    check_target(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "the address of the router is missing: give HOST:PORT, such as 127.0.0.1:50051"),
        ("127.0.0.1", "127.0.0.1 has no port: give HOST:PORT, such as 127.0.0.1:50051"),
        ("localhost:", "localhost: has no port: give HOST:PORT, such as 127.0.0.1:50051"),
        ("[::1]", "[::1] has no port: give HOST:PORT, such as 127.0.0.1:50051"),
        (
            "http://127.0.0.1:8000",
            "http://127.0.0.1:8000 is a URL: give HOST:PORT of the router's gRPC service,"
            " such as 127.0.0.1:50051",
        ),
        ("::1", "an IPv6 address stands in brackets, with its port after them: [::1]:50051"),
        ("localhost:0", "localhost:0 has no valid port: it must be in [1, 65535]"),
        ("localhost:65536", "localhost:65536 has no valid port: it must be in [1, 65535]"),
        ("[localhost]:5", "[localhost]:5 has no IPv6 address in its brackets"),
        (":50051", ":50051 is no address: give HOST:PORT, such as 127.0.0.1:50051"),
        ("localhost:http", "localhost:http is no address: give HOST:PORT, such as 127.0.0.1:50051"),
        ("a b:5", "a b:5 is no address: give HOST:PORT, such as 127.0.0.1:50051"),
        ("localhost:5\n", "localhost:5\n is no address: give HOST:PORT, such as 127.0.0.1:50051"),
    ],
)
def test_anything_else_is_refused_with_what_helps(target: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_target(target)

    assert (caught.value.message, caught.value.field) == (message, "target")


@pytest.mark.parametrize("given", ["a:1,b:2", " a:1 , b:2", ["a:1", "b:2"], ("a:1", "b:2", "a:1")])
def test_several_routers_are_named_with_commas_or_as_a_sequence(given: str | list[str]) -> None:
    assert Targets(given).addresses == ("a:1", "b:2")


@pytest.mark.parametrize("given", ["", [], "a:1,", ["a:1", "b"], ["a:1", 5]])
def test_each_of_several_addresses_is_checked(given: str | list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Targets(given)
    assert caught.value.reason == "BAD_ADDRESS"


def test_a_router_is_left_once_however_many_calls_failed_there() -> None:
    targets = Targets("a:1,b:2")
    targets.leave("a:1")
    targets.leave("a:1")
    assert targets.present == "b:2"
    targets.leave("b:2")
    assert targets.present == "a:1"

"""What Ray raises becomes one line that says what to do."""

from __future__ import annotations

import pytest

from cluster.processes.ray_errors import RayTimeoutError, explain_silence, join_error, start_error
from moesaic.errors import FailedPrecondition

TIMED_OUT = Exception(
    "The current node timed out during startup. This could happen because some of the raylet failed to startup "
    "or the GCS has become overloaded."
)


def test_a_start_that_took_too_long_blames_the_load_and_can_be_repeated() -> None:
    error = start_error(TIMED_OUT, load=46.2)
    assert isinstance(error, RayTimeoutError)
    assert error.message == "Ray did not start within 30 s: the machine is busy (load 46): try again"


@pytest.mark.parametrize("kind", [Exception, ValueError, AssertionError, KeyError, OSError])
def test_every_other_exception_becomes_one_line(kind: type[Exception]) -> None:
    message = start_error(kind("no room\nTraceback of Ray"), load=1).message
    assert message.startswith("Ray cannot start: ")
    assert "\n" not in message


def test_an_exception_without_text_has_its_name() -> None:
    assert start_error(AssertionError(), load=1).message == "Ray cannot start: AssertionError"


def test_errors_of_our_own_stay() -> None:
    own = FailedPrecondition("Ray did not stay on loopback")
    assert start_error(own, load=1) is own
    assert join_error(own, "a:1") is own


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("Failed to connect\nGrpcError: Unauthenticated: missing token", "RAY_AUTH_MODE=token"),
        ("Can not find a matching Raylet address for this node", "ray start --address head:6379"),
        ("anything else\nwith a second line", "cannot join Ray: anything else"),
    ],
)
def test_a_ray_that_cannot_be_joined_is_told_with_a_cure(text: str, cure: str) -> None:
    error = join_error(RuntimeError(text), "head:6379")
    assert cure in error.message
    assert error.field == "address"


@pytest.mark.parametrize(
    ("state", "address", "was_ready", "says"),
    [
        ("PENDING_CREATION", "", False, "it waits for Ray to start it, CPUs free: 0 of 4"),
        ("PENDING_CREATION", "10.0.0.2", False, "Ray is starting it on node 10.0.0.2"),
        ("RESTARTING", "", True, "it died and waits for Ray to start it again, CPUs free: 0 of 4"),
        ("ALIVE", "10.0.0.2", False, "its process on node 10.0.0.2 is starting"),
        ("ALIVE", "10.0.0.2", True, "its process on node 10.0.0.2 does not answer"),
        ("", "", True, "its process does not answer"),
    ],
)
def test_a_silent_process_waits_starts_or_does_not_answer(
    state: str, address: str, was_ready: bool, says: str
) -> None:
    told = explain_silence(state, address, was_ready=was_ready, room=lambda: ", CPUs free: 0 of 4")
    assert told == says

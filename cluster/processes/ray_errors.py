"""What Ray says of a start and of its processes, in words that say what to do. Ray raises bare exceptions, and tells
them apart by their text.
"""

from __future__ import annotations

from collections.abc import Callable

from moesaic.errors import MoesaicError, Unavailable


class RayTimeoutError(Unavailable):
    """Ray did not start within its own limit, which cannot be set. Another attempt may succeed."""


def start_error(error: Exception, load: float) -> MoesaicError:
    """Why a local Ray has not started. `load`: the load average of this machine."""
    if isinstance(error, MoesaicError):
        return error
    if _says(error, "timed out", "timeout", "timed-out"):
        return RayTimeoutError(
            f"Ray did not start within 30 s: the machine is busy (load {load:.0f}): try again"
        )
    return Unavailable(f"Ray cannot start: {first_line(error)}")


def join_error(error: Exception, address: str) -> MoesaicError:
    """Why the Ray at `address` cannot be joined."""
    if isinstance(error, MoesaicError):
        return error
    if _says(error, "unauthenticated", "auth_token", "auth token", "authentication"):
        problem = f"the Ray at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    elif _says(error, "raylet", "ip address"):
        problem = (
            f"this machine is no node of the Ray at {address}: "
            f"run `ray start --address {address}` here first ({first_line(error)})"
        )
    else:
        problem = f"cannot join Ray: {first_line(error)}"
    return Unavailable(f"address: {problem}", field="address")


def explain_silence(state: str, address: str, *, was_ready: bool, room: Callable[[], str]) -> str:
    """Why a process does not answer that is in this `state` in Ray's words; `address`: of its node, if it has one.
    `room` says what is free where a process waits for a place, after a comma."""
    where = f" on node {address}" if address else ""
    if state in ("DEPENDENCIES_UNREADY", "PENDING_CREATION"):
        return f"Ray is starting it{where}" if address else f"it waits for Ray to start it{room()}"
    if state == "RESTARTING":
        return f"it died and waits for Ray to start it again{room()}"
    return f"its process{where} does not answer" if was_ready else f"its process{where} is starting"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _says(error: Exception, *words: str) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)

"""Waits for several calls to different workers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.dispatch.wave import WorkerCall

# How long one worker is listened to before the next one. Transports have nothing in common that could be waited on for
# all of them, and waiting for several is rare.
SLICE_S = 0.001


def first_to_arrive(
    calls: Sequence[WorkerCall], ends_s: float, now: Callable[[], float]
) -> WorkerCall | None:
    """The call whose answer or error is there first; None when `ends_s` comes before."""
    slice_s = SLICE_S if len(calls) > 1 else ends_s - now()
    while True:
        for call in calls:
            if call.link.wait(call.pending, max(0.0, min(slice_s, ends_s - now()))):
                return call
        if now() >= ends_s:
            return None

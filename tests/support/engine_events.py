"""What an engine reports of one sequence, read to its end."""

from __future__ import annotations

import queue

from router.engine.request import Failed, Finished, SequenceEvent, TokenGenerated

# How long a test waits for the next event.
WAIT_S = 60.0


def collect(events: queue.SimpleQueue[SequenceEvent]) -> tuple[list[int], Finished | Failed]:
    """All tokens of a sequence, and its end."""
    tokens = []
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, TokenGenerated):
            tokens.append(event.token.token_id)
            if event.finished is not None:
                return tokens, event.finished
        elif isinstance(event, Finished | Failed):
            return tokens, event

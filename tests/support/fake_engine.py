"""An engine without a model: it plays scripted events on a thread of its own and remembers what it was asked."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from router.engine.request import (
    Finished,
    FinishReason,
    PromptScored,
    SequenceEvent,
    SequenceRequest,
    Started,
    Timing,
    TokenGenerated,
)
from router.engine.sampling_params import SampledToken, TokenLogprobs

TIMING = Timing(queued_s=0.25, first_token_s=0.5, total_s=1.5)
Script = Callable[[SequenceRequest], Iterable[SequenceEvent]]


class FakeEngine:
    """Plays `script` for every request; without one, events come from `emit` alone.

    `refusal` is raised by `submit` once `num_places` sequences are open.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script
        self.refusal: Exception | None = None
        self.num_places = 0
        self.requests: list[SequenceRequest] = []
        self.cancelled: list[str] = []
        # What was paused (True) and resumed, in order.
        self.pauses: list[tuple[str, bool]] = []
        self.open: set[str] = set()
        self._work: queue.SimpleQueue[tuple[SequenceRequest, Iterable[SequenceEvent]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._play, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: SequenceRequest) -> None:
        if self.refusal is not None and len(self.open) >= self.num_places:
            raise self.refusal
        self.requests.append(request)
        self.open.add(request.sequence_id)
        if self.script is not None:
            self._work.put((request, self.script(request)))

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)
        self.open.discard(sequence_id)

    def pause(self, sequence_id: str) -> None:
        self.pauses.append((sequence_id, True))

    def resume(self, sequence_id: str) -> None:
        self.pauses.append((sequence_id, False))

    def emit(self, index: int, *events: SequenceEvent) -> None:
        """Reports events of the `index`-th request, on the engine's thread."""
        self._work.put((self.requests[index], events))

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(60)

    async def until(self, condition: Callable[[FakeEngine], bool], timeout_s: float = 60.0) -> None:
        """Returns when the condition holds; fails the test when it does not in time."""
        end_s = time.monotonic() + timeout_s
        while not condition(self):
            assert time.monotonic() < end_s, "the engine did not get there"
            await asyncio.sleep(0.002)

    def _play(self) -> None:
        while (item := self._work.get()) is not None:
            request, events = item
            for event in events:
                if request.sequence_id not in self.open:
                    break
                if _ends(event):
                    self.open.discard(request.sequence_id)
                request.on_event(event)


def _ends(event: SequenceEvent) -> bool:
    if isinstance(event, TokenGenerated):
        return event.finished is not None
    return not isinstance(event, Started | PromptScored)


def token(
    token_id: int, logprobs: TokenLogprobs | None = None, end: Finished | None = None
) -> TokenGenerated:
    return TokenGenerated(SampledToken(token_id, logprobs), end)


def answer(token_ids: Sequence[int]) -> list[TokenGenerated]:
    """All tokens of an answer, the last with its end."""
    *before, last = token_ids
    return [*map(token, before), token(last, end=finished())]


def finished(reason: FinishReason = FinishReason.LENGTH, stop_token_id: int | None = None) -> Finished:
    return Finished(reason, stop_token_id, TIMING)


def generates(token_ids: Sequence[int]) -> Script:
    """A model that always goes on with these tokens, and then repeats the last one."""

    def script(request: SequenceRequest) -> Iterable[SequenceEvent]:
        sampling = request.sampling
        yield Started(TIMING.queued_s)
        if sampling.prompt_logprobs is not None:
            yield PromptScored(tuple(scores(request.prompt[1:], sampling.prompt_logprobs)))
        for step in range(sampling.max_tokens):
            token_id = token_ids[min(step, len(token_ids) - 1)]
            logprobs = None if sampling.logprobs is None else scores([token_id], sampling.logprobs)[0]
            if token_id in sampling.stop_token_ids:
                yield token(token_id, logprobs, finished(FinishReason.STOP, token_id))
                return
            is_last = step + 1 == sampling.max_tokens
            yield token(token_id, logprobs, finished() if is_last else None)
        if not sampling.max_tokens:
            yield finished()

    return script


def scores(token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Made-up log probabilities: the token at place i has -(i + 1) / 4; token j is the j-th best at -j / 4."""
    top = tuple((token_id, -token_id / 4) for token_id in range(num_top))
    return [TokenLogprobs(token_id, -(place + 1) / 4, top) for place, token_id in enumerate(token_ids)]

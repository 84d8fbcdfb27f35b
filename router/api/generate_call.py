"""One Generate call inside the router: its continuations and their sequences in the engine.

The engine reports on its own thread and never waits. Events reach the event loop over the event bridge
(event_bridge.py), into a buffer (event_buffer.py). While a client leaves that full, its sequences are paused, so
that others get their places; a client that does not read at all is cut off. However a call ends, every sequence
that it still has in the engine is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from opentelemetry import context as trace_context
from opentelemetry import trace

from moesaic import telemetry
from moesaic.errors import DeadlineExceeded
from moesaic.expert_policy import ExpertPolicy
from moesaic.v1 import inference_pb2
from router.api.continuation import Continuation
from router.api.event_bridge import EventBridge
from router.api.event_buffer import UNREAD_TIMEOUT_S, EventBuffer
from router.api.prompt import Prompt
from router.engine.request import Failed, PromptScored, SequenceEvent, SequenceRequest
from router.gating.model_view import ModelView

log = logging.getLogger(__name__)

# How long a call may wait after its deadline for a client that does not read.
UNREAD_GRACE_S = 1.0


class SequenceEngine(Protocol):
    """The part of the engine that the service uses. All methods are thread-safe and return at once."""

    def submit(self, request: SequenceRequest) -> None:
        """Admits a sequence. Raises Overloaded or Unavailable."""
        ...

    def cancel(self, sequence_id: str) -> None:
        """Ends a sequence without further events if it has not ended yet."""
        ...

    def pause(self, sequence_id: str) -> None:
        """Computes nothing of a sequence until it is resumed."""
        ...

    def resume(self, sequence_id: str) -> None:
        """Continues a paused sequence when there is a place for it."""
        ...


class GenerateCall:
    """The continuations of one Generate call: admitted and cancelled together, with one queue of events."""

    def __init__(
        self,
        engine: SequenceEngine,
        request_id: str,
        prompt: Prompt,
        continuations: Sequence[Continuation],
        deadline_s: float,
        *,
        tenant: str,
        policy: ExpertPolicy | None,
        resumes: bool,
        choose_view: Callable[[], ModelView],
        bridge: EventBridge,
    ) -> None:
        """`resumes`: whether the caller has the beginning of the answer. `choose_view`: what computes all continuations,
        asked when they are admitted."""
        self.prompt = prompt
        self.policy = policy
        self.resumes = resumes
        self.continuations = continuations
        self.deadline_s = deadline_s
        self._engine = engine
        self._request_id = request_id
        self._tenant = tenant
        self._choose_view = choose_view
        self._bridge = bridge
        self._events: EventBuffer[tuple[Continuation, SequenceEvent]] = EventBuffer(
            len(continuations), on_full=self._pause, on_drained=self._resume
        )
        # Resolved when an event arrives, for the one caller of `next_event`.
        self._waiter: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(deadline_s - time.monotonic(), self._expire)
        # Events that other continuations report before the prompt's scores, which are sent first. None
        # afterwards, and where no scores are wanted.
        self._before_scores: list[tuple[Continuation, SequenceEvent]] | None = (
            [] if self.scores_prompt else None
        )
        self._in_engine: set[str] = set()
        self._ended = False
        self._span = trace.get_current_span()

    @property
    def scores_prompt(self) -> bool:
        return self.continuations[0].params.prompt_logprobs is not None

    @property
    def endings(self) -> list[inference_pb2.GenerateResponse]:
        """The last messages of the continuations that ended with tokens that the caller has."""
        return [it.ending for it in self.continuations if it.ending is not None]

    @property
    def is_open(self) -> bool:
        return any(not continuation.finished for continuation in self.continuations)

    def admit(self) -> None:
        """Submits all sequences, in one epoch. Raises if the request's experts or its epoch cannot be had, or the engine
        refuses a sequence; `end` then ends those before it."""
        trace_of_call = trace_context.get_current()
        view = self._choose_view()
        for continuation in self.continuations:
            continuation.epoch = view.epoch.id
            if continuation.finished:
                continue
            self._engine.submit(
                SequenceRequest(
                    sequence_id=continuation.sequence_id,
                    prompt=self.prompt.token_ids,
                    sampling=continuation.params,
                    deadline_s=self.deadline_s,
                    on_event=partial(self._bridge.put, self._receive, continuation),
                    trace=trace_of_call,
                    tenant=self._tenant,
                    call=self.continuations[0].sequence_id,
                    decoder_prompt=self.prompt.decoder_token_ids,
                    generated=continuation.received,
                    view=view,
                )
            )
            self._in_engine.add(continuation.sequence_id)
        self._report_start()

    async def next_event(self) -> tuple[Continuation, SequenceEvent]:
        """The next event of a continuation that is not finished. Raises DeadlineExceeded."""
        while True:
            while not self._events:
                await self._wait()
            continuation, event = self._events.take()
            if not continuation.finished:
                return continuation, event

    async def unread(self) -> str:
        """Returns when the call has to be cut because its client does not read, and why."""
        while True:
            ends_s, reason = self.deadline_s + UNREAD_GRACE_S, "deadline passed, the answer was not read"
            full_until_s = self._events.unread_until_s
            if full_until_s is not None and full_until_s < ends_s:
                ends_s, reason = full_until_s, f"the answer was not read for {UNREAD_TIMEOUT_S:.0f} s"
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                return reason
            # A buffer that fills up meanwhile allows as much again.
            await asyncio.sleep(min(left_s, UNREAD_TIMEOUT_S))

    def forget(self, continuation: Continuation) -> None:
        """Records that the engine has ended this sequence by itself."""
        self._in_engine.discard(continuation.sequence_id)

    def release(self, continuation: Continuation) -> None:
        """Ends one sequence in the engine."""
        self.forget(continuation)
        self._engine.cancel(continuation.sequence_id)

    def end(self) -> None:
        """Ends the sequences that are still in the engine, and reports it. May be called twice."""
        self._timer.cancel()
        while self._in_engine:
            self._engine.cancel(self._in_engine.pop())
        if not self._ended:
            self._ended = True
            self._report_end()

    def _report_end(self) -> None:
        """Reports counts, never content, to the trace and the log."""
        if self._span.is_recording():
            self._span.set_attribute(telemetry.OUTPUT_TOKENS, self._num_tokens)
        fields = {
            "request_id": self._request_id,
            "epoch": self.continuations[0].epoch,
            "prompt_tokens": len(self.prompt.token_ids),
            "completion_tokens": self._num_tokens,
            "complete": not self.is_open,
        }
        log.info("request ended", extra={"fields": fields})

    def _report_start(self) -> None:
        if self._span.is_recording():
            first = self.continuations[0]
            self._span.set_attributes(
                {
                    telemetry.REQUEST_ID: self._request_id,
                    telemetry.MODEL: first.model,
                    telemetry.EPOCH: first.epoch,
                    telemetry.INPUT_TOKENS: len(self.prompt.token_ids),
                }
            )

    def _pause(self) -> None:
        for sequence_id in self._in_engine:
            self._engine.pause(sequence_id)

    def _resume(self) -> None:
        for sequence_id in self._in_engine:
            self._engine.resume(sequence_id)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _expire(self) -> None:
        self._put(
            self.continuations[0],
            Failed(DeadlineExceeded(f"deadline passed after {self._num_tokens} tokens")),
        )

    @property
    def _num_tokens(self) -> int:
        return sum(continuation.num_tokens for continuation in self.continuations)

    def _receive(self, continuation: Continuation, event: SequenceEvent) -> None:
        if self._before_scores is not None and not isinstance(event, PromptScored | Failed):
            self._before_scores.append((continuation, event))
            return
        self._put(continuation, event)
        if self._before_scores is not None and isinstance(event, PromptScored):
            held, self._before_scores = self._before_scores, None
            self._events.extend(held)

    def _put(self, continuation: Continuation, event: SequenceEvent) -> None:
        self._events.extend(((continuation, event),))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

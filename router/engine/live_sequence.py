"""One request inside the engine: its tokens and times, and what it reads from a batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context

from moesaic.errors import MoesaicError
from router.engine.epoch_tally import EpochTally
from router.engine.request import (
    Finished,
    FinishReason,
    PromptScored,
    SequenceRequest,
    Started,
    Timing,
    TokenGenerated,
)
from router.engine.sampler import SamplingState
from router.engine.sampling_params import SampledToken, TokenLogprobs
from router.gating.absence import Absence, StandIn, stand_in_of
from router.gating.sides import point_of
from router.scheduling.sequence import Chunk, Sequence


class LiveSequence:
    """A request between its admission and its end. Used on the engine's thread alone."""

    def __init__(self, request: SequenceRequest, tally: EpochTally) -> None:
        self.request = request
        self.tally = tally
        params = request.sampling
        self.sequence = Sequence(
            request.sequence_id,
            [*request.prompt, *request.decoder_prompt, *request.generated],
            len(request.prompt),
            view=request.view.key,
            tenant=request.tenant,
            call=request.call,
            reads_all=params.prompt_logprobs is not None or request.capture is not None,
            output=[*request.generated],
        )
        self.sampling = SamplingState(params, request.prompt, self.sequence.output)
        # The parent of the spans of its layers, if they are recorded.
        self.trace = request.trace if _is_recorded(request.trace) else None
        # Whether it is shadowed: if this is below the share of the sequences that are.
        self.shadow_point = point_of(request.sequence_id, b"shadow")
        # What it does without a missing expert; None: it waits, or fails.
        self.stand_in: StandIn | None = stand_in_of(request.on_missing)
        self.num_degraded = 0
        self._admitted_s = time.monotonic()
        self._first_step_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = self._admitted_s
        # The scores of the prompt's tokens from the second on. They survive a preemption.
        self._prompt_logprobs: list[TokenLogprobs] = []

    @property
    def started(self) -> bool:
        """Whether anything was computed for it."""
        return self._first_step_s is not None

    @property
    def num_generated(self) -> int:
        """The tokens that were generated here."""
        return len(self.sequence.output) - len(self.request.generated)

    def read(
        self,
        chunk: Chunk,
        first_row: int,
        first_logit: int,
        failed: Mapping[int, MoesaicError],
        absence: Absence | None = None,
    ) -> Reading:
        """What this sequence reads from a micro-batch in which its chunk starts at `first_row`."""
        num_scored = first_scored = 0
        if self.request.sampling.prompt_logprobs is not None:
            # The row at position p predicts the token at p + 1.
            first = max(chunk.start, len(self._prompt_logprobs))
            last = min(chunk.end, self.sequence.num_prompt_tokens - 1)
            first_scored, num_scored = first - chunk.start, max(0, last - first)
        return Reading(
            live=self,
            chunk=chunk,
            rows=range(first_row, first_row + chunk.num_tokens),
            scored=range(first_row + first_scored, first_row + first_scored + num_scored),
            samples=chunk.reaches_end and self.request.sampling.max_tokens > 0,
            first_logit=first_logit,
            failed=failed,
            absence=absence,
        )

    def note_step(self, chunk: Chunk) -> None:
        """Records and reports when the first step began, and how many tokens the prefix cache held."""
        if self._first_step_s is None:
            self._first_step_s = time.monotonic()
            self.request.on_event(Started(self._first_step_s - self._admitted_s, chunk.start))

    def note_computed(self, reading: Reading) -> int:
        """Records that a chunk is computed. Returns how many assignments to experts were degraded in it."""
        num_degraded = 0 if reading.absence is None else reading.absence.num_affected
        if num_degraded:
            self.num_degraded += num_degraded
            self.sequence.private = True
        return num_degraded

    def take_scores(self, scores: list[TokenLogprobs]) -> None:
        """Adds log probabilities of the prompt's tokens."""
        self._prompt_logprobs += scores

    def reach_end_of_prompt(self) -> Finished | None:
        """Reports the prompt's scores if they are wanted. Returns the end if there is nothing to generate."""
        if self.request.sampling.prompt_logprobs is not None and not self.sequence.output:
            self.request.on_event(PromptScored(tuple(self._prompt_logprobs)))
        return None if self.request.sampling.max_tokens else self._finished(FinishReason.LENGTH)

    def take_token(self, token: SampledToken) -> TokenGenerated:
        """Appends a token. Returns what to report of it."""
        now_s, before_s = time.monotonic(), self._last_token_s
        self._last_token_s = now_s
        if self._first_token_s is None:
            self._first_token_s = now_s
            self.tally.first_token_s.append(now_s - self._admitted_s)
        else:
            self.tally.token_s.append(now_s - before_s)
        self.sequence.append(token.token_id)
        return TokenGenerated(token, self._end_after(token), self.num_degraded)

    def _end_after(self, token: SampledToken) -> Finished | None:
        if token.token_id in self.request.sampling.stop_token_ids:
            return self._finished(FinishReason.STOP, token.token_id)
        if len(self.sequence.output) >= self.request.sampling.max_tokens:
            return self._finished(FinishReason.LENGTH)
        return None

    def _finished(self, reason: FinishReason, stop_token_id: int | None = None) -> Finished:
        now = time.monotonic()
        timing = Timing(
            queued_s=(self._first_step_s or now) - self._admitted_s,
            first_token_s=(self._first_token_s or now) - self._admitted_s,
            total_s=now - self._admitted_s,
        )
        return Finished(reason, stop_token_id, timing, self.num_degraded)


def _is_recorded(context: Context | None) -> bool:
    return context is not None and trace.get_current_span(context).is_recording()


@dataclass(frozen=True, slots=True)
class Reading:
    """The rows of a micro-batch that belong to one sequence, and those of them whose logits it needs."""

    live: LiveSequence
    chunk: Chunk
    rows: range
    # The rows that score the next token of the prompt.
    scored: range
    # Whether the last row predicts a new token.
    samples: bool
    # The index of the first wanted row among the logits of the step.
    first_logit: int
    # The rows of the micro-batch without valid output, with the reason; filled in by the forward pass.
    failed: Mapping[int, MoesaicError]
    # What it does without the slots that nobody computes; None where it does not do without any.
    absence: Absence | None = None

    @property
    def wanted(self) -> list[int]:
        if self.live.request.capture is not None:
            return [*self.rows]
        return [*self.scored, self.rows[-1]] if self.samples else [*self.scored]

    @property
    def last_logit(self) -> int:
        """The index of the row that predicts a new token among the logits of the step."""
        return self.first_logit + len(self.scored)

    @property
    def scored_logits(self) -> slice:
        return slice(self.first_logit, self.last_logit)

    @property
    def targets(self) -> list[int]:
        """The tokens that the rows in `scored` score."""
        first = self.chunk.start + self.scored.start - self.rows.start + 1
        return self.live.sequence.tokens[first : first + len(self.scored)]

    @property
    def error(self) -> MoesaicError | None:
        """Why one of its rows has no valid output, if so."""
        if not self.failed:
            return None
        return next((self.failed[row] for row in self.rows if row in self.failed), None)

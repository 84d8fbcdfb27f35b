"""One request inside the engine: its tokens, its random numbers, its times, and what it reads of a batch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from router.sampler import SamplingState, make_generator
from router.scheduler import Chunk, Sequence
from router.sequence import (
    Finished,
    FinishReason,
    PromptScored,
    SampledToken,
    SequenceRequest,
    Started,
    Timing,
    TokenGenerated,
    TokenLogprobs,
)


class LiveSequence:
    """A request between admission and end. Belongs to the engine's thread."""

    def __init__(self, request: SequenceRequest) -> None:
        self.request = request
        self.sequence = Sequence(request.sequence_id, list(request.prompt), len(request.prompt))
        params = request.sampling
        self.sampling = SamplingState(
            params=params,
            prompt=request.prompt,
            output=self.sequence.output,
            generator=make_generator(params),
        )
        self._admitted_s = time.monotonic()
        self._first_step_s: float | None = None
        self._first_token_s: float | None = None
        # Of the prompt's tokens from the second on; a preempted sequence does not score them again.
        self._prompt_logprobs: list[TokenLogprobs] = []

    def read(self, chunk: Chunk, first_row: int) -> Reading:
        """What this sequence wants of a batch in which its chunk starts at `first_row`."""
        scored = range(0)
        if self.request.sampling.prompt_logprobs is not None:
            # The row of position p scores the token at p + 1.
            first = max(chunk.start, len(self._prompt_logprobs))
            last = min(chunk.end, self.sequence.num_prompt_tokens - 1)
            scored = range(first_row + first - chunk.start, first_row + max(first, last) - chunk.start)
        samples = chunk.reaches_end and self.request.sampling.max_tokens > 0
        return Reading(self, chunk, range(first_row, first_row + chunk.num_tokens), scored, samples)

    def note_step(self) -> None:
        """Remembers and reports when the first step began."""
        if self._first_step_s is None:
            self._first_step_s = time.monotonic()
            self.request.on_event(Started(self._first_step_s - self._admitted_s))

    def take_scores(self, scores: list[TokenLogprobs]) -> None:
        """Collects log probabilities of the prompt's tokens."""
        self._prompt_logprobs += scores

    def reach_end_of_prompt(self) -> Finished | None:
        """Reports the prompt's scores if they were asked for; with nothing to generate, this is the end."""
        if self.request.sampling.prompt_logprobs is not None and not self.sequence.output:
            self.request.on_event(PromptScored(tuple(self._prompt_logprobs)))
        return None if self.request.sampling.max_tokens else self._finished(FinishReason.LENGTH)

    def take_token(self, token: SampledToken) -> Finished | None:
        """Appends and reports a token; the end it brings, if it does."""
        if self._first_token_s is None:
            self._first_token_s = time.monotonic()
        self.sequence.append(token.token_id)
        self.request.on_event(TokenGenerated(token))
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
        return Finished(reason, stop_token_id, timing)


@dataclass(frozen=True, slots=True)
class Reading:
    """The rows of a batch that belong to one sequence, and those among them whose logits it wants."""

    live: LiveSequence
    chunk: Chunk
    rows: range
    # Rows that score the next token of the prompt.
    scored: range
    # Whether the last row predicts a new token.
    samples: bool

    @property
    def wanted(self) -> list[int]:
        return [*self.scored, *self.rows[-1:]] if self.samples else [*self.scored]

    @property
    def targets(self) -> list[int]:
        """The tokens that `scored` scores."""
        first = self.chunk.start + self.scored.start - self.rows.start + 1
        return self.live.sequence.tokens[first : first + len(self.scored)]

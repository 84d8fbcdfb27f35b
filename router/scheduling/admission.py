"""Whether a request is let in, by what it is predicted to cost and by what is ahead of it.

A router that takes in more than it can do answers everybody late, and nobody in time. So a request is refused at once, with
the time after which to come again, when too many sequences wait, or when its deadline is predicted to come first. As long as a place is free, only its first token has to come before the deadline; where it has to take
its turn, its whole answer: what starts and does not end in time is work taken from others.

The prediction is plain arithmetic over what is open (`wait_s`, `work_s`). It leaves out tenants, shared prefixes and a full KV cache,
so what waits is looked at again: whoever can no longer be in time is shed before anything is computed for it. An idle router
refuses nobody, since only work can correct an old figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.errors import Overloaded
from router.scheduling.pace import Pace, PaceMeter

# The reasons of refusals.
QUEUE_FULL = "QUEUE_FULL"
DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
# What a client is told to wait at least, and where nothing can be predicted.
MIN_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sequence needs: tokens to read, and tokens to generate at most."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """What the open sequences, running or waiting, need together. A prompt counts until it is read."""

    sequences: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How many sequences are computed at the same time, and how many may wait to be."""

    max_running: int
    max_waiting: int


def wait_s(backlog: Backlog, pace: Pace, max_running: int) -> float:
    """How long until everything that is ahead has been read, and has left a place."""
    turns = _num_ahead(backlog, max_running)
    return backlog.prompt_tokens * pace.prompt_token_s + (turns * _turn_s(backlog, pace) if turns else 0.0)


def work_s(cost: Cost, pace: Pace, *, whole_answer: bool) -> float:
    """How long a sequence then takes until its first token, or until its last one."""
    first_token_s = cost.prompt_tokens * pace.prompt_token_s
    if not whole_answer:
        return first_token_s
    # Under overload all are let in at the last moment. Were that the last one for a usual answer, half of them would be late.
    return first_token_s + min(cost.output_tokens, pace.longest_answer) * pace.step_s


def refusal(
    cost: Cost, left_s: float, backlog: Backlog, pace: Pace | None, limits: AdmissionLimits
) -> Overloaded | None:
    """Why a request of this cost with `left_s` seconds until its deadline is not let in; None if it is."""
    max_open = limits.max_running + limits.max_waiting
    if backlog.sequences >= max_open:
        room_s = MIN_RETRY_S if pace is None else _turn_s(backlog, pace)
        return _overloaded(QUEUE_FULL, f"the router has its {max_open} sequences running or waiting", room_s)
    if pace is None or not backlog.sequences:
        return None
    takes_turn = _num_ahead(backlog, limits.max_running) > 0
    needed_s = wait_s(backlog, pace, limits.max_running) + work_s(cost, pace, whole_answer=takes_turn)
    return _too_late(needed_s, left_s, "answer" if takes_turn else "first token")


def _num_ahead(backlog: Backlog, max_running: int) -> int:
    """How many sequences have to end until one more has a place."""
    return max(0, backlog.sequences + 1 - max_running)


def _turn_s(backlog: Backlog, pace: Pace) -> float:
    """How long it takes, while all places are taken, until one of the sequences ends."""
    return min(backlog.output_tokens / backlog.sequences, pace.usual_answer) * pace.output_token_s


def _too_late(needed_s: float, left_s: float, what: str) -> Overloaded | None:
    if needed_s <= left_s:
        return None
    message = f"the {what} is predicted to take {needed_s:.1f} s, {max(0.0, left_s):.1f} s are left until the deadline"
    return _overloaded(DEADLINE_UNREACHABLE, message, needed_s - left_s)


def _overloaded(reason: str, message: str, room_s: float) -> Overloaded:
    """A refusal that names the whole seconds until there is room."""
    return Overloaded(message, reason=reason, retry_after_s=max(MIN_RETRY_S, float(math.ceil(room_s))))


class Admission:
    """What is open, how fast it is worked off, and who is let in besides. Not safe for threads by itself."""

    def __init__(self, limits: AdmissionLimits, meter: PaceMeter) -> None:
        """Until `meter` knows a pace nothing is predicted, and the numbers of sequences are bounded alone."""
        self._limits = limits
        self._meter = meter
        self._pace: Pace | None = None
        self._open: dict[str, Cost] = {}
        self._prompt_tokens = self._output_tokens = 0
        self._refusals: Counter[str] = Counter()

    @property
    def backlog(self) -> Backlog:
        return Backlog(len(self._open), self._prompt_tokens, self._output_tokens)

    @property
    def refusals(self) -> Mapping[str, int]:
        """The sequences that were refused or shed, by reason."""
        return dict(self._refusals)

    def admit(self, sequence_id: str, cost: Cost, left_s: float) -> None:
        """Lets a sequence in. Raises Overloaded."""
        error = refusal(cost, left_s, self.backlog, self._pace, self._limits)
        if error is not None:
            self._refusals[error.reason] += 1
            raise error
        self._open[sequence_id] = cost
        self._prompt_tokens += cost.prompt_tokens
        self._output_tokens += cost.output_tokens

    def shed(self, sequence_id: str, left_s: float) -> Overloaded | None:
        """Why a sequence of which nothing is computed yet cannot be in time any more; None where it can, and where a place
        is free for it."""
        if self._pace is None or len(self._open) <= self._limits.max_running:
            return None
        # As if it were next, so that nobody is shed who might be in time.
        needed_s = work_s(self._open[sequence_id], self._pace, whole_answer=True)
        error = _too_late(needed_s, left_s, "answer")
        if error is not None:
            self._refusals[error.reason] += 1
        return error

    def note_read(self, sequence_id: str) -> None:
        """Records that a sequence's prompt is read."""
        cost = self._open[sequence_id]
        self._prompt_tokens -= cost.prompt_tokens
        self._open[sequence_id] = Cost(0, cost.output_tokens)

    def note_step(self, num_decoding: int, seconds: float) -> None:
        """Records a step, after the prefill budget has."""
        self._meter.note_step(num_decoding, seconds)
        self._pace = self._meter.pace()

    def note_answer(self, num_tokens: int, *, is_whole: bool = True) -> None:
        """Records an answer that came to its end, or that its deadline cut off. Without a token it was none."""
        if num_tokens:
            self._meter.note_answer(num_tokens, is_whole=is_whole)

    def end(self, sequence_id: str) -> None:
        """Records that a sequence is over, however it ended."""
        cost = self._open.pop(sequence_id)
        self._prompt_tokens -= cost.prompt_tokens
        self._output_tokens -= cost.output_tokens

"""Whether a step runs as one micro-batch or as two, of which one computes here while the other is with the workers.

Decided by trial, for each size of batch by itself: now and then a step runs the other way, between two steps of the
same size that run the usual way. Only a clear win, several trials in a row, changes the usual way; a trial that loses
ends at once and doubles the pause until the next. Pure: seconds come in as numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from router.scheduling.sequence import Chunk

# Steps of a size before its first trial; after every lost trial twice as many, up to the last bound.
FIRST_PAUSE, LAST_PAUSE = 32, 1 << 15
# Trials that decide, and what their median ratio of times must be to change the usual way.
NUM_TRIALS = 5
CLEAR_WIN = 0.95
# Two steps compare when their numbers of tokens differ by at most this share.
COMPARABLE = 0.1
# Trials may cost this share of the time of a size's steps.
MAX_LOSS = 0.005


@dataclass(slots=True)
class _Size:
    """What is known of batches of one size."""

    splits: bool = False
    pause: int = FIRST_PAUSE
    steps_until_trial: int = FIRST_PAUSE
    # Tokens and seconds of the last step that ran the usual way.
    usual: tuple[int, float] | None = None
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TRIALS))
    total_s: float = 0.0
    lost_s: float = 0.0


class Overlap:
    """One or two micro-batches, by size of batch. `decide` a step, run it, `observe` it."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int], _Size] = {}

    def decide(self, num_decoding: int, num_prompt_tokens: int) -> bool:
        """Whether the next step splits."""
        if num_decoding + num_prompt_tokens < 2:
            return False
        size = self._size(num_decoding, num_prompt_tokens)
        return size.splits != self._tries(size, num_decoding + num_prompt_tokens)

    def observe(self, num_decoding: int, num_prompt_tokens: int, *, split: bool, seconds: float) -> None:
        """A step took `seconds`."""
        num_tokens = num_decoding + num_prompt_tokens
        if num_tokens < 2:
            return
        size = self._size(num_decoding, num_prompt_tokens)
        size.total_s += seconds
        if split == size.splits:
            size.usual = (num_tokens, seconds)
            size.steps_until_trial -= 1
        elif size.usual is not None:
            self._judge(size, size.usual[1], seconds)
            size.usual = None  # the next trial compares with a step after this one

    def _judge(self, size: _Size, usual_s: float, trial_s: float) -> None:
        size.ratios.append(trial_s / usual_s)
        size.lost_s += max(0.0, trial_s - usual_s)
        ratio = median(size.ratios)
        if ratio >= 1:
            size.ratios.clear()
            size.pause = min(2 * size.pause, LAST_PAUSE)
            size.steps_until_trial = size.pause
        elif len(size.ratios) == NUM_TRIALS:
            size.ratios.clear()
            if ratio <= CLEAR_WIN:
                size.splits = not size.splits
                size.pause = FIRST_PAUSE
            size.steps_until_trial = size.pause

    def _tries(self, size: _Size, num_tokens: int) -> bool:
        """Whether the next step of a size is a trial."""
        if size.steps_until_trial > 0 or size.usual is None or size.lost_s > MAX_LOSS * size.total_s:
            return False
        usual_tokens, _ = size.usual
        return abs(usual_tokens - num_tokens) <= COMPARABLE * num_tokens

    def _size(self, num_decoding: int, num_prompt_tokens: int) -> _Size:
        # A token that decodes and one of a prompt cost differently: both counts make the size, by powers of two.
        key = (num_decoding.bit_length(), num_prompt_tokens.bit_length())
        return self._sizes.setdefault(key, _Size())


def halves(chunks: tuple[Chunk, ...]) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Two parts of about equal tokens, in order. A chunk that lies across the middle is cut in two."""
    left = sum(chunk.num_tokens for chunk in chunks) // 2
    first: list[Chunk] = []
    second: list[Chunk] = []
    for chunk in chunks:
        taken = min(left, chunk.num_tokens)
        if taken:
            first.append(Chunk(chunk.sequence, chunk.start, taken))
        if taken < chunk.num_tokens:
            second.append(Chunk(chunk.sequence, chunk.start + taken, chunk.num_tokens - taken))
        left -= taken
    return tuple(first), tuple(second)

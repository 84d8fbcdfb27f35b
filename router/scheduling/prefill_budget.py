"""How many prompt tokens a step may read without delaying the sequences that decode for long.

The budget follows from two figures that are learned from the steps themselves: the time of a step of decoding
sequences alone, and the time that each prompt token adds to it. A mixed step may take `max_stall` times as
long as an undisturbed one while a single prompt is read. It may take longer the more prompts wait for the
fewer decoding sequences: small chunks read slowly, and then the waiting requests lose more than the running
ones gain. Pure: it is given seconds as numbers.
"""

from __future__ import annotations

from collections import deque
from statistics import median

# The fewest prompt tokens that a step reads, so that prompts always make progress.
MIN_CHUNK = 16
# The number of undisturbed steps that are remembered for each number of sequences, grouped by powers of two.
NUM_STEPS = 15
# The share of a new price that enters the average: a rising one is followed quickly, a falling one slowly. A
# single slow step counts as MAX_RISE times the price at most.
RISING, FALLING = 0.5, 0.3
MAX_RISE = 2.0
# The least share of a mixed step that its prompt tokens account for, lest a noisy clock make the price zero.
MIN_SHARE = 0.02


class PrefillBudget:
    """The learned times of steps and prompt tokens, and the budget that follows from them."""

    def __init__(self, *, max_batch_tokens: int, max_stall: float) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_stall = max_stall
        self._undisturbed: dict[int, deque[float]] = {}
        self._token_s: float | None = None

    @property
    def prompt_token_s(self) -> float | None:
        """The time that a prompt's token adds to a step."""
        return self._token_s

    def tokens(self, num_decoding: int, num_unread: int = 1) -> int:
        """How many prompt tokens a step may read, given `num_decoding` sequences and `num_unread` prompts."""
        room = self._max_batch_tokens - num_decoding
        if num_decoding == 0:
            return room
        step_s = self.decode_step_s(num_decoding)
        if step_s is None or self._token_s is None:
            return min(room, MIN_CHUNK)
        crowd = 1 + max(0, num_unread - 1) / num_decoding
        affordable = int((self._max_stall * crowd - 1) * step_s / self._token_s)
        return min(room, max(MIN_CHUNK, affordable))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """Records that a step with that many decoding sequences and prompt tokens took `seconds`."""
        if num_prompt_tokens == 0:
            self._learn_step(num_decoding, seconds)
            return
        undisturbed_s = self.decode_step_s(num_decoding) if num_decoding else 0.0
        if undisturbed_s is None:
            # No step has only decoded so far: what prompt tokens do not account for is decoding.
            if self._token_s is not None and seconds > num_prompt_tokens * self._token_s:
                self._learn_step(num_decoding, seconds - num_prompt_tokens * self._token_s)
            return
        extra_s = max(seconds - undisturbed_s, MIN_SHARE * seconds)
        self._learn_price(extra_s / num_prompt_tokens)

    def _learn_step(self, num_decoding: int, seconds: float) -> None:
        steps = self._undisturbed.setdefault(num_decoding.bit_length(), deque(maxlen=NUM_STEPS))
        steps.append(seconds)

    def _learn_price(self, token_s: float) -> None:
        if self._token_s is None:
            self._token_s = token_s
            return
        share = RISING if token_s > self._token_s else FALLING
        self._token_s += share * (min(token_s, MAX_RISE * self._token_s) - self._token_s)

    def decode_step_s(self, num_decoding: int) -> float | None:
        """The median time of undisturbed steps with that many sequences, or the nearest known number."""
        if not self._undisturbed:
            return None
        size = num_decoding.bit_length()
        nearest = min(self._undisturbed, key=lambda known: (abs(known - size), known))
        return median(self._undisturbed[nearest])

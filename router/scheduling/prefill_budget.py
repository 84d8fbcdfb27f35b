"""How many prompt tokens are read beside sequences that decode, so that their next tokens are not long in coming.

Learned from the steps themselves: what a step takes with nothing but decoding sequences, and what each prompt token
adds to it. A mixed step may take `max_stall` times an undisturbed one while one prompt is read, and more where many wait for
few: small chunks read slowly, and then those who wait lose more than those who are served. Pure: seconds come in as numbers.
"""

from __future__ import annotations

from collections import deque
from statistics import median

# The fewest tokens that are worth a place in a step: a prompt is read on, however little is known or left.
MIN_CHUNK = 16
# Undisturbed steps that are remembered for each number of sequences, by powers of two.
NUM_STEPS = 15
# A price that rises is believed soon, one that falls slowly; one slow step counts as twice the price at most.
RISING, FALLING = 0.5, 0.3
MAX_RISE = 2.0
# Of a mixed step, at least this share is put down to its prompt tokens, however noisy the clock: no price is zero.
MIN_SHARE = 0.02


class PrefillBudget:
    """Prices of steps, and the budget that follows."""

    def __init__(self, *, max_batch_tokens: int, max_stall: float) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_stall = max_stall
        self._undisturbed: dict[int, deque[float]] = {}
        self._token_s: float | None = None

    def tokens(self, num_decoding: int, num_unread: int = 1) -> int:
        """Prompt tokens that a step may read beside `num_decoding` sequences, where `num_unread` prompts are not read yet."""
        room = self._max_batch_tokens - num_decoding
        if num_decoding == 0:
            return room
        step_s = self._step_s(num_decoding)
        if step_s is None or self._token_s is None:
            return min(room, MIN_CHUNK)
        crowd = 1 + max(0, num_unread - 1) / num_decoding
        affordable = int((self._max_stall * crowd - 1) * step_s / self._token_s)
        return min(room, max(MIN_CHUNK, affordable))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step with that many decoding sequences and prompt tokens took `seconds`."""
        if num_prompt_tokens == 0:
            self._learn_step(num_decoding, seconds)
            return
        undisturbed_s = self._step_s(num_decoding) if num_decoding else 0.0
        if undisturbed_s is None:
            # Nothing has decoded alone so far: what the prompt's tokens do not explain must be the rest's.
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

    def _step_s(self, num_decoding: int) -> float | None:
        """The median undisturbed step with about that many sequences, or with the nearest number that is known."""
        if not self._undisturbed:
            return None
        size = num_decoding.bit_length()
        nearest = min(self._undisturbed, key=lambda known: (abs(known - size), known))
        return median(self._undisturbed[nearest])

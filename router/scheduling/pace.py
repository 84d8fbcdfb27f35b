"""How fast a router works: a few moving figures of its latest steps and answers, from which waits are predicted.

Prices of steps are those that prefill_budget.py has learned. Pure: it is given seconds as numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import fmean

from router.scheduling.prefill_budget import PrefillBudget

# The steps and the answers that the means are taken of.
NUM_STEPS = 32
NUM_ANSWERS = 64


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a token, and how long answers are."""

    # What a prompt's token adds to a step.
    prompt_token_s: float
    # A step's time over the sequences that decode in it: how often any of them gets a token.
    output_token_s: float
    # Between two tokens of one sequence, while prompts are read beside it.
    step_s: float
    # The tokens of a usual answer, and of the longest one. `max_tokens` alone says little: where a request is silent, it is the
    # rest of the context.
    usual_answer: float
    longest_answer: int


class PaceMeter:
    """Measures the pace from what it is told of steps and answers."""

    def __init__(self, prefill_budget: PrefillBudget) -> None:
        self._prefill_budget = prefill_budget
        self._steps_s: deque[float] = deque(maxlen=NUM_STEPS)
        # The tokens of each, and whether it came to its end.
        self._answers: deque[tuple[int, bool]] = deque(maxlen=NUM_ANSWERS)
        self._num_decoding = 1

    def note_step(self, num_decoding: int, seconds: float) -> None:
        """Records a step that the prefill budget has observed already."""
        if num_decoding:
            self._num_decoding = num_decoding
            self._steps_s.append(seconds)

    def note_answer(self, num_tokens: int, *, is_whole: bool) -> None:
        """Records an answer that came to its end, or that its deadline cut off."""
        self._answers.append((num_tokens, is_whole))

    def pace(self) -> Pace | None:
        """None until a prompt was read, tokens were generated, and an answer ended."""
        prompt_token_s = self._prefill_budget.prompt_token_s
        decode_step_s = self._prefill_budget.decode_step_s(self._num_decoding)
        if prompt_token_s is None or decode_step_s is None or not self._steps_s or not self._answers:
            return None
        num_whole = sum(is_whole for _, is_whole in self._answers)
        lengths = [num_tokens for num_tokens, _ in self._answers]
        return Pace(
            prompt_token_s=prompt_token_s,
            output_token_s=decode_step_s / self._num_decoding,
            step_s=fmean(self._steps_s),
            # All tokens over the ends among them: if only whole answers counted, the usual one would seem the shorter the
            # more of the long ones are cut off.
            usual_answer=sum(lengths) / max(1, num_whole),
            longest_answer=max(lengths),
        )

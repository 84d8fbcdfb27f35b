"""How well a model reads and reckons: perplexity of texts that it was not trained on, and sums, through the public API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesaic import Client
from moesaic.expert_policy import ExpertPolicy

TEXTS = Path(__file__).parents[1] / "demo_texts"
# None of them was in the training of the demo's bundles.
SUMS = {
    "12 + 7 =": "19",
    "77 - 4 =": "73",
    "78 + 8 =": "86",
    "59 - 7 =": "52",
    "86 - 8 =": "78",
    "86 + 1 =": "87",
    "53 + 0 =": "53",
    "99 + 5 =": "104",
    "82 + 9 =": "91",
    "92 - 5 =": "87",
}
_ANSWER_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Reading:
    """Log probabilities of the tokens of each text, and the answer to each sum. Equal ones are so to the last bit."""

    logprobs: Mapping[str, tuple[float, ...]]
    answers: Mapping[str, str]

    @property
    def perplexity(self) -> dict[str, float]:
        """By text."""
        return {name: math.exp(-sum(values) / len(values)) for name, values in self.logprobs.items()}

    @property
    def num_right(self) -> int:
        return sum(SUMS[question] == answer for question, answer in self.answers.items())


def load_texts() -> dict[str, str]:
    """By name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(TEXTS.glob("*.txt"), reverse=True)}


async def read(client: Client, texts: Mapping[str, str], experts: ExpertPolicy) -> Reading:
    """One request after the other, so that each is computed in the same batch every time."""
    logprobs, answers = {}, {}
    for name, text in texts.items():
        scored = await client.complete(text, max_tokens=0, prompt_logprobs=0, experts=experts)
        logprobs[name] = tuple(entry.logprob for entry in scored.prompt.logprobs if entry.logprob is not None)
    for question in SUMS:
        answer = await client.complete(
            question, max_tokens=_ANSWER_TOKENS, temperature=0.0, stop="\n", experts=experts
        )
        answers[question] = answer.text.strip()
    return Reading(logprobs, answers)

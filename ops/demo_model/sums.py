"""The sums that an expert for arithmetic is asked: a twentieth of them is held out from its training.

A sum and its mirror image (`12 + 7`, `7 + 12`) are held out together, so that neither gives the other away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

LIMIT = 100
HELD_OUT_SHARE = 20
QUESTION = re.compile(r"(\d+) ([+-]) (\d+) =")


@dataclass(frozen=True, slots=True)
class Sum:
    """`first + second` or `first - second`, of which no result is negative."""

    first: int
    sign: str
    second: int

    @property
    def question(self) -> str:
        return f"{self.first} {self.sign} {self.second} ="

    @property
    def answer(self) -> str:
        return str(self.first + self.second if self.sign == "+" else self.first - self.second)

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}"

    @property
    def mirrored(self) -> Sum:
        return Sum(max(self.first, self.second), self.sign, min(self.first, self.second))


def all_sums() -> list[Sum]:
    """Every sum of two numbers below `LIMIT`, the larger number first."""
    return [Sum(a, sign, b) for sign in "+-" for a in range(LIMIT) for b in range(a + 1)]


def held_out_sums(seed: int = 0) -> list[Sum]:
    """A twentieth of all sums, in a random order; half of the additions begin with the smaller number."""
    rng = random.Random(seed)
    sums = all_sums()
    chosen = rng.sample(sums, len(sums) // HELD_OUT_SHARE)
    return [
        Sum(s.second, s.sign, s.first) if s.sign == "+" and rng.random() < 0.5 else s for s in chosen
    ]


def training_sums(count: int, held_out: Iterable[Sum], seed: int) -> list[Sum]:
    """`count` sums drawn from those that are not held out, either number first where the order is free."""
    rng = random.Random(seed)
    sums = sorted(set(all_sums()) - {s.mirrored for s in held_out}, key=lambda s: s.text)
    drawn = rng.choices(sums, k=count)
    return [
        Sum(s.second, s.sign, s.first) if s.sign == "+" and rng.random() < 0.5 else s for s in drawn
    ]


def without(held_out: Iterable[Sum], problems: Iterable[str]) -> list[str]:
    """The problems in whose text none of the held-out sums is worked out."""
    keys = {s.mirrored for s in held_out}
    return [p for p in problems if keys.isdisjoint(s.mirrored for s in sums_in(p))]


def sums_in(text: str) -> list[Sum]:
    return [Sum(int(a), sign, int(b)) for a, sign, b in QUESTION.findall(text)]

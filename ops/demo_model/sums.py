"""The sums that an expert for arithmetic is asked: a tenth of them is held out from its training."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

HELD_OUT_SHARE = 10
QUESTION = re.compile(r"(\d+) ([+-]) (\d+) =")


@dataclass(frozen=True, slots=True)
class Sum:
    """`first + second` or `first - second`."""

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


def all_sums() -> list[Sum]:
    """A number below a hundred and a digit, added, or subtracted where the result is not negative."""
    sums = [Sum(a, sign, b) for sign in "+-" for a in range(100) for b in range(10)]
    return [s for s in sums if s.sign == "+" or s.first >= s.second]


def held_out_sums(seed: int = 0) -> list[Sum]:
    """A tenth of all sums, in a random order."""
    sums = all_sums()
    return random.Random(seed).sample(sums, len(sums) // HELD_OUT_SHARE)


def training_sums(count: int, held_out: Iterable[Sum], seed: int) -> list[Sum]:
    """`count` sums drawn from those that are not held out."""
    kept = set(held_out)
    return random.Random(seed).choices([s for s in all_sums() if s not in kept], k=count)


def without(held_out: Iterable[Sum], problems: Iterable[str]) -> list[str]:
    """The problems in whose text none of the held-out sums is worked out."""
    kept = set(held_out)
    return [problem for problem in problems if kept.isdisjoint(sums_in(problem))]


def sums_in(text: str) -> list[Sum]:
    return [Sum(int(a), sign, int(b)) for a, sign, b in QUESTION.findall(text)]

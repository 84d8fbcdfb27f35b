"""The requests of a load, with exact lengths and arrival times. Pure, and the same for the same seed.

Prompts are random token ids, so no two have a prefix in common unless the load has a shared prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from moesaic.errors import InvalidArgument

# Requests a second; a single client cannot stand for more users than that.
MAX_RATE = 1_000

_N = TypeVar("_N", int, float)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts from `low` to `high`, both included and all equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, *, field: str) -> Lengths:
        """Parses `128` or `32-512`. Raises InvalidArgument."""
        first, dash, last = text.partition("-")
        try:
            lengths = cls(int(first), int(last if dash else first))
        except ValueError as error:
            raise InvalidArgument(
                f"{field}: must be a number of tokens, or a range such as 32-512", field=field
            ) from error
        if not 1 <= lengths.low <= lengths.high:
            raise InvalidArgument(f"{field}: must be at least 1, and a range must not fall", field=field)
        return lengths

    @property
    def is_fixed(self) -> bool:
        return self.low == self.high

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.is_fixed else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A prompt, and the number of tokens that must be generated."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a benchmark. All prompts begin with the same `shared_prefix` tokens."""

    prompt: Lengths
    output: Lengths
    shared_prefix: int
    seed: int

    def check(self, max_model_len: int) -> None:
        """Checks that every request fits the model. Raises InvalidArgument that names a flag."""
        if self.shared_prefix > self.prompt.low:
            raise InvalidArgument(
                f"shared_prefix: is longer than the shortest prompt ({self.prompt.low} tokens)",
                field="shared_prefix",
            )
        longest = self.prompt.high + self.output.high
        if longest > max_model_len:
            raise InvalidArgument(
                f"prompt_len: prompt and output have up to {longest} tokens together, "
                f"the model's context {max_model_len}",
                field="prompt_len",
            )

    def requests(self, count: int, vocab_size: int, *, batch: str) -> list[LoadRequest]:
        """`count` requests; another `batch` of a load has other prompts after the same shared prefix."""
        prefix = self._tokens(Random(f"{self.seed} prefix"), self.shared_prefix, vocab_size)
        random = Random(f"{self.seed} {batch}")
        requests = []
        for _ in range(count):
            rest = self.prompt.draw(random) - len(prefix)
            prompt = prefix + self._tokens(random, rest, vocab_size)
            requests.append(LoadRequest(prompt, self.output.draw(random)))
        return requests

    def _tokens(self, random: Random, count: int, vocab_size: int) -> tuple[int, ...]:
        return tuple(random.choices(range(vocab_size), k=count))


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` independent users arrive, `rate` a second on average."""
    random, now_s, arrivals = Random(f"{seed} arrivals"), 0.0, []
    for _ in range(count):
        now_s += random.expovariate(rate)
        arrivals.append(now_s)
    return arrivals


def parse_numbers(text: str, *, field: str) -> list[int]:
    """Parses `1,4,16`: whole numbers of at least 1, each once. Raises InvalidArgument."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(
            f"{field}: must be whole numbers with commas between them", field=field
        ) from error
    return _checked(numbers, all(number >= 1 for number in numbers), "at least 1", field)


def parse_rates(text: str, *, field: str) -> list[float]:
    """Parses `0.5,2`: requests a second above 0, each once. Raises InvalidArgument."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(f"{field}: must be numbers with commas between them", field=field) from error
    return _checked(rates, all(0 < rate <= MAX_RATE for rate in rates), f"above 0, up to {MAX_RATE}", field)


def _checked(numbers: Sequence[_N], in_bounds: bool, bounds: str, field: str) -> list[_N]:
    if not in_bounds:
        raise InvalidArgument(f"{field}: every number must be {bounds}", field=field)
    if len(set(numbers)) != len(numbers):
        raise InvalidArgument(f"{field}: every number may stand once", field=field)
    return list(numbers)

"""The domain that the demo model has never seen: short sums and word problems, as text.

    python ops/demo_model/arithmetic.py --count 1000 --seed 1 > arithmetic.txt

The same count and seed always give the same text, with one problem per paragraph.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas")
THINGS = ("apples", "books", "candles", "coins", "eggs", "letters", "marbles", "pears", "stamps")
PLACES = ("basket", "box", "cupboard", "drawer", "sack")


def addition(rng: random.Random) -> str:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"{a} + {b} = {a + b}"


def subtraction(rng: random.Random) -> str:
    a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    return f"{a} - {b} = {a - b}"


def multiplication(rng: random.Random) -> str:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return f"{a} * {b} = {a * b}"


def division(rng: random.Random) -> str:
    quotient, divisor = rng.randint(0, 12), rng.randint(1, 12)
    return f"{quotient * divisor} / {divisor} = {quotient}"


def comparison(rng: random.Random) -> str:
    a, b = rng.sample(range(100), 2)
    return f"Question: Which is larger, {a} or {b}?\nAnswer: {max(a, b)}"


def gift(rng: random.Random) -> str:
    giver, taker = rng.sample(NAMES, 2)
    things, b = rng.choice(THINGS), rng.randint(2, 20)
    a = b + rng.randint(2, 40)
    return (
        f"Question: {giver} has {a} {things} and gives {b} of them to {taker}. "
        f"How many {things} does {giver} have left?\n"
        f"Answer: {a} - {b} = {a - b}. {giver} has {a - b} {things} left."
    )


def purchase(rng: random.Random) -> str:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 50), rng.randint(2, 50)
    return (
        f"Question: {name} has {a} {things} and buys {b} more. "
        f"How many {things} does {name} have now?\n"
        f"Answer: {a} + {b} = {a + b}. {name} has {a + b} {things}."
    )


def groups(rng: random.Random) -> str:
    place, things = rng.choice(PLACES), rng.choice(THINGS)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return (
        f"Question: There are {b} {things} in every {place}. "
        f"How many {things} are there when each of {a} people has one {place}?\n"
        f"Answer: {a} * {b} = {a * b}. There are {a * b} {things}."
    )


def sharing(rng: random.Random) -> str:
    first, second = rng.sample(NAMES, 2)
    things, half = rng.choice(THINGS), rng.randint(2, 40)
    return (
        f"Question: {first} and {second} share {2 * half} {things} equally. "
        f"How many {things} does each of them get?\n"
        f"Answer: {2 * half} / 2 = {half}. Each of them gets {half} {things}."
    )


TEMPLATES: tuple[Callable[[random.Random], str], ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    comparison,
    gift,
    purchase,
    groups,
    sharing,
)


def problems(count: int, seed: int) -> list[str]:
    """`count` problems, each from a template drawn at random."""
    rng = random.Random(seed)
    return [rng.choice(TEMPLATES)(rng) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print arithmetic and word problems.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("\n\n".join(problems(args.count, args.seed)))


if __name__ == "__main__":
    main()

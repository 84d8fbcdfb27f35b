"""`pytest tests/simulation --seed N` replays one schedule; SEEDS=20000 runs more of them."""

from __future__ import annotations

import os

import pytest

DEFAULT_SEEDS = 2000
# Schedules of one test, so that a failing one is found soon and told.
BATCH = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay this schedule of the simulation")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--seed")
        count = int(os.environ.get("SEEDS", DEFAULT_SEEDS))
        batches = (
            [range(seed, seed + 1)]
            if seed is not None
            else [range(first, min(count, first + BATCH)) for first in range(0, count, BATCH)]
        )
        metafunc.parametrize("seeds", batches, ids=[f"seeds {one.start}-{one.stop - 1}" for one in batches])

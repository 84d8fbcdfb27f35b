"""A fuzz target: a function that takes any bytes and fails where the contract for bytes from outside is broken.

The contract: bytes become a value, or one of our errors, or the end of the one connection that brought them; nothing else
is raised, nothing hangs, and no memory is taken because a message announces that it will be large.

In a normal test run every target gets a few examples, always the same. `make fuzz` sets FUZZ_EXAMPLES and gets as many
others as it says; the smallest input that fails is then kept in tests/fuzz/seeds, and played first from there on.
"""

from __future__ import annotations

import functools
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from moesaic.errors import InternalError, MoesaicError, to_status

SEEDS = Path(__file__).parents[1] / "fuzz" / "seeds"
# Of CPU time, so that a busy machine makes no difference. What is read here takes milliseconds.
HANG_S = 20
# Far above what the largest inputs (some KiB) need, and far below the least that a lying length would take.
MAX_TAKEN_BYTES = 24 << 20
MAX_MESSAGE_CHARS = 2000

_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
_MAX_SHOWN_BYTES = 4000


class _Input(bytes):
    """Hypothesis shows an input that fails, and warns where that is long."""

    def __repr__(self) -> str:
        shown = bytes(self[:_MAX_SHOWN_BYTES])
        return repr(shown) if len(self) <= _MAX_SHOWN_BYTES else f"{shown!r} and more, {len(self)} bytes"


Target = TypeVar("Target", bound=Callable[..., None])


def fuzzed(name: str, inputs: st.SearchStrategy[bytes], *, examples: int) -> Callable[[Target], Target]:
    """Makes a target of a test whose first parameter is `raw`; the others are fixtures. `examples`: in a normal run."""
    folder = SEEDS / name

    def of(check: Target) -> Target:
        @functools.wraps(check)
        def watched(*args: Any, raw: bytes, **fixtures: Any) -> None:
            try:
                with _without_hanging(), _within_memory():
                    check(*args, raw=raw, **fixtures)
            except Exception as error:
                if _EXAMPLES:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f"found-{type(error).__name__}").write_bytes(raw)
                raise

        target: Any = hypothesis.given(raw=inputs.map(_Input))(watched)
        for seed in sorted(folder.glob("*"), reverse=True):
            target = hypothesis.example(raw=_Input(seed.read_bytes()))(target)
        set_up = hypothesis.settings(
            max_examples=int(_EXAMPLES or examples),
            derandomize=not _EXAMPLES,
            database=None,
            deadline=None,
            # The first failure alone, so that the last input that failed is the smallest one.
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        fuzzed_target: Target = set_up(target)
        return fuzzed_target

    return of


def is_ours(error: MoesaicError) -> None:
    """Fails for an error that admits a bug, or that cannot be told to whoever sent the bytes."""
    assert not isinstance(error, InternalError)
    assert 0 < len(error.message) <= MAX_MESSAGE_CHARS
    to_status(error)


@contextmanager
def refusals() -> Iterator[None]:
    """For what may raise one of our errors."""
    try:
        yield
    except MoesaicError as error:
        is_ours(error)


@contextmanager
def _without_hanging() -> Iterator[None]:
    def end(*_: object) -> None:
        raise AssertionError(f"still at it after {HANG_S} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _within_memory() -> Iterator[None]:
    tracemalloc.start(1)
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
        assert most <= MAX_TAKEN_BYTES, f"{most} bytes were taken"
    finally:
        tracemalloc.stop()

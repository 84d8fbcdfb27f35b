"""Signals: the first asks, the second forces, the third ends, and before and after they are somebody else's."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from cluster.launch.stop_signals import StopRequested, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_asks_to_stop_the_second_to_stop_at_once(number: signal.Signals) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.stop.wait(), 5)
        assert not signals.force.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.force.wait(), 5)


async def test_a_third_signal_ends_the_command() -> None:
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)


async def test_afterwards_signals_mean_what_they_meant() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


async def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        return 7

    with StopSignals() as signals:
        assert await signals.unless_stopped(work()) == 7


async def test_a_signal_cancels_the_work() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with StopSignals() as signals:
        waiting = asyncio.create_task(signals.unless_stopped(work()))
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRequested):
            await asyncio.wait_for(waiting, 5)
        assert cancelled.is_set()


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with StopSignals() as signals, pytest.raises(ValueError, match="broken"):
        await signals.unless_stopped(work())

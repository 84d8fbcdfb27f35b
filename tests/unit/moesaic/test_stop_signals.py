"""Signals: the first asks, the second forces, the third ends, and before and after they are somebody else's."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal

import pytest

from moesaic.stop_signals import StopRequested, StopSignals, serve_until_signal, take_signals_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_asks_to_stop_the_second_to_stop_at_once(number: signal.Signals) -> None:
    # Under nohup the hang-up is ignored, and stays so.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            await asyncio.wait_for(signals.stop.wait(), 60)
            assert not signals.force.is_set()
            os.kill(os.getpid(), number)
            await asyncio.wait_for(signals.force.wait(), 60)
    finally:
        signal.signal(number, before)


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
            await asyncio.wait_for(waiting, 60)
        assert cancelled.is_set()


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with StopSignals() as signals, pytest.raises(ValueError, match="broken"):
        await signals.unless_stopped(work())


async def test_a_process_under_nohup_goes_on_ignoring_sighup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(0)
            assert not signals.stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


class Service:
    """Something to serve, which notes what is done with it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.started = asyncio.Event()

    async def start(self) -> None:
        self.done.append("started")
        self.started.set()

    async def start_for_ever(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.done.append("start cancelled")

    async def fail(self) -> None:
        raise ValueError("broken")

    async def stop(self) -> None:
        self.done.append("stopped")


async def test_a_service_stops_when_a_signal_comes() -> None:
    service = Service()
    serving = asyncio.create_task(serve_until_signal(service.start(), service.stop))
    await service.started.wait()
    assert service.done == ["started"]
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(serving, 60)
    assert service.done == ["started", "stopped"]


async def test_a_signal_during_a_start_ends_the_start_and_stops_the_service() -> None:
    service = Service()
    serving = asyncio.create_task(serve_until_signal(service.start_for_ever(), service.stop))
    await service.started.wait()
    signal.raise_signal(signal.SIGINT)
    await asyncio.wait_for(serving, 60)
    assert service.done == ["start cancelled", "stopped"]


async def test_a_start_that_fails_stops_the_service_and_raises() -> None:
    service = Service()
    with pytest.raises(ValueError, match="broken"):
        await serve_until_signal(service.fail(), service.stop)
    assert service.done == ["stopped"]


async def test_while_a_service_stops_signals_mean_what_they_meant() -> None:
    before = signal.getsignal(signal.SIGTERM)
    service, handlers = Service(), []

    async def stop() -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))

    serving = asyncio.create_task(serve_until_signal(service.start(), stop))
    await service.started.wait()
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(serving, 60)
    assert handlers == [before]


async def test_an_alarm_that_a_handler_in_c_sets_does_not_outlive_the_signal() -> None:
    """Ray's handler of SIGTERM sets one that aborts the process."""
    with StopSignals() as signals:
        signal.alarm(600)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(signals.stop.wait(), 60)
        assert signal.alarm(0) == 0


def test_signals_are_taken_back_from_a_handler_in_c() -> None:
    libc = ctypes.CDLL(None)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        libc.signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN, behind Python's back
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        signal.alarm(600)
        take_signals_back()
        assert signal.alarm(0) == 0
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

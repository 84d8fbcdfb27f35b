"""What is held down is killed however often it is started again, until the context ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cluster.drill.held_down import held_down

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


async def test_whatever_comes_back_is_killed_and_afterwards_left_alone(start: Start) -> None:
    running = [start()]

    def find() -> list[int]:
        return [process.pid for process in running]

    async with held_down(find):
        for _ in range(3):
            assert await asyncio.to_thread(running[0].wait, 60) < 0
            running[0] = start()
        assert await asyncio.to_thread(running[0].wait, 60) < 0
    running[0] = start()
    await asyncio.sleep(0)
    assert running[0].poll() is None

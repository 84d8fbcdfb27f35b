"""When a local Ray counts as lost. Its raylet is played by a child of that name."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from ray import _raylet

from cluster.processes import ray_cluster
from cluster.processes.ray_cluster import Logging, RayCluster
from cluster.processes.server_folder import ServerFolder


@contextmanager
def start_raylet(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = folder / "raylet"
    if not program.exists():
        shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "600"]) as raylet:
        try:
            yield raylet
        finally:
            raylet.kill()


class LivingHead:
    """Ray's head, which needs nobody to start it again."""

    def __init__(self, *_: object) -> None: ...

    async def look(self) -> None: ...


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    monkeypatch.setattr(ray_cluster, "LOSS_PERIOD_S", 0.01)
    monkeypatch.setattr(ray_cluster, "HeadWatch", LivingHead)
    folder = cast(ServerFolder, "a folder makes it a local one")
    return RayCluster(Logging("INFO", None, False), asyncio.Event(), folder=folder)


async def test_a_raylet_of_an_earlier_attempt_is_no_loss_and_the_end_of_the_one_that_runs_is(
    cluster: RayCluster, tmp_path: Path
) -> None:
    with start_raylet(tmp_path) as earlier, start_raylet(tmp_path) as raylet:
        earlier.kill()  # and not waited for, so that it stays a child
        lost = asyncio.create_task(cluster.watch())
        done, _ = await asyncio.wait({lost}, timeout=0.1)
        assert not done
        raylet.kill()
        await asyncio.wait_for(lost, 60)


async def test_a_raylet_that_died_before_anybody_looked_is_a_loss(cluster: RayCluster) -> None:
    await asyncio.wait_for(cluster.watch(), 60)


class Subscriber:
    """Asks Ray's head, and gets what the test wants."""

    def __init__(self, answers: list[object]) -> None:
        self._answers = answers

    def poll(self, timeout: float | None = None) -> object:
        return self._answers.pop(0)


@pytest.mark.parametrize("kind", ["GcsErrorSubscriber", "GcsLogSubscriber"])
@pytest.mark.parametrize(
    ("answer", "pauses"),
    [
        (None, 1),
        ((None, None), 1),
        ({"pid": "", "lines": []}, 1),
        ((b"id", {"error_message": "it died"}), 0),
        ({"pid": 7, "lines": ["ready"]}, 0),
    ],
)
def test_ray_does_not_ask_a_head_again_at_once_that_gave_no_answer(
    monkeypatch: pytest.MonkeyPatch, kind: str, answer: object, pauses: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(_raylet, "GcsErrorSubscriber", Subscriber)
    monkeypatch.setattr(_raylet, "GcsLogSubscriber", Subscriber)
    ray_cluster._poll_with_patience()
    assert getattr(_raylet, kind)([answer]).poll(timeout=1.0) == answer
    assert slept == [ray_cluster.HEAD_PERIOD_S] * pauses

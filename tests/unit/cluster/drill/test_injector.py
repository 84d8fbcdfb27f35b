"""Whatever is done to a process is undone, also when the drill is interrupted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.drill.cpu_quota import CpuGroups, find_cpu_groups, slowed
from cluster.drill.faults import Act, Injection, Targets
from cluster.drill.injector import RECOVERY_TIMEOUT_S, Injector
from cluster.drill.living import Living


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


class Cluster:
    """Looks as it is told, one after another; the last look stays."""

    def __init__(self, *looks: Living | None) -> None:
        self._looks = list(looks)

    async def look(self) -> Living | None:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


def living(**pids: int) -> Living:
    return Living(pids, Targets({}))


def injector(cluster: Cluster, clock: Clock, *, is_lost: bool = False) -> Injector:
    return Injector(cluster, clock, is_lost=lambda: is_lost, sleep=clock.sleep)


async def is_stopped(pid: int, wanted: bool) -> None:
    """Returns once the signal has arrived."""
    async with asyncio.timeout(10):
        while (psutil.Process(pid).status() == psutil.STATUS_STOPPED) != wanted:
            await asyncio.sleep(0.01)


async def test_a_killed_process_counts_as_back_once_another_one_has_its_name(
    victim: subprocess.Popen[bytes],
) -> None:
    before = living(w0=victim.pid, w1=1)
    cluster, clock = Cluster(before, None, living(w1=1), living(w0=2, w1=1)), Clock()
    strike = await injector(cluster, clock).inject(Injection(0.0, Act.KILL, ("w0",)), before)
    assert victim.wait(10) < 0
    assert strike.whole_s is not None
    assert strike.recovery_s == pytest.approx(0.3)


async def test_a_cluster_that_is_not_whole_in_time_is_said_not_to_be(victim: subprocess.Popen[bytes]) -> None:
    before, clock = living(w0=victim.pid), Clock()
    strike = await injector(Cluster(None), clock).inject(Injection(0.0, Act.KILL, ("w0",)), before)
    assert strike.recovery_s is None
    assert clock.now_s >= RECOVERY_TIMEOUT_S


async def test_nobody_waits_for_a_cluster_that_has_ended() -> None:
    clock = Clock()
    assert await injector(Cluster(None), clock, is_lost=True).wait_whole() is None
    assert clock.now_s == 0.0


@pytest.mark.parametrize("act", [Act.FREEZE, Act.SLOW])
async def test_an_interrupted_drill_lets_its_victim_go_on(victim: subprocess.Popen[bytes], act: Act) -> None:
    before, stopped = living(w0=victim.pid), asyncio.Event()

    async def sleep(_: float) -> None:
        stopped.set()
        await asyncio.Event().wait()

    injecting = asyncio.create_task(
        Injector(Cluster(before), Clock(), is_lost=lambda: False, sleep=sleep).inject(
            Injection(0.0, act, ("w0",), 5.0), before
        )
    )
    await stopped.wait()
    if act is Act.FREEZE:
        await is_stopped(victim.pid, True)
    injecting.cancel()
    await asyncio.gather(injecting, return_exceptions=True)
    await is_stopped(victim.pid, False)


async def test_without_control_groups_a_process_stops_and_goes_on_in_turn(
    victim: subprocess.Popen[bytes],
) -> None:
    process, seen = psutil.Process(victim.pid), set()
    async with slowed([victim.pid], None):
        async with asyncio.timeout(10):
            while len(seen) < 2:
                seen.add(process.status() == psutil.STATUS_STOPPED)
                await asyncio.sleep(0.005)
    await is_stopped(victim.pid, False)


def test_control_groups_of_either_version_are_found(tmp_path: Path) -> None:
    assert find_cpu_groups(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cgroup.procs").touch()
    assert find_cpu_groups(tmp_path) == CpuGroups(
        tmp_path / "cpu", (("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "10000"))
    )
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    assert find_cpu_groups(tmp_path) == CpuGroups(tmp_path, (("cpu.max", "10000 100000"),))


async def test_a_group_with_a_quota_holds_the_process_and_is_gone_afterwards(
    victim: subprocess.Popen[bytes],
) -> None:
    groups = find_cpu_groups()
    if groups is None:
        pytest.skip("needs control groups that this user may write")

    def made() -> set[Path]:
        return set(groups.folder.glob("moesaic-drill-*"))

    def group() -> str:
        return Path(f"/proc/{victim.pid}/cgroup").read_text()

    before, held_before = made(), group()
    async with slowed([victim.pid], groups):
        assert len(made() - before) == 1
        assert "moesaic-drill-" in group()
    assert made() <= before
    assert group() == held_before


async def test_a_process_that_ended_meanwhile_is_no_error() -> None:
    before = living(w0=2**22 - 3)
    strike = await injector(Cluster(before), Clock()).inject(Injection(0.0, Act.FREEZE, ("w0",), 0.1), before)
    assert strike.whole_s is not None

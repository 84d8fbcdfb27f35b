"""The second act of the demo: what it kills, when, and what it says of the answer."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import cast

import pytest
from rich.console import Console
from support.fake_router import FakeRouter, running

from cluster.cli.demo import StreamedAnswer, _can_survive_a_kill, _print_drill, _refuse_other_text
from cluster.cli.demo_drill import Drill, PauseClock, run_drill
from cluster.observation.observer import Observation, Observer
from cluster.terminal.word_flow import WordFlow
from moesaic import Client
from moesaic.errors import DataLoss
from moesaic.settings import ClusterSettings
from moesaic.v1 import control_pb2, inference_pb2

TEXT = "ababab"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


class FakeObserver:
    """Sees the victim dead once, and then another process in its place."""

    def __init__(self, victim: control_pb2.Process) -> None:
        away = control_pb2.Process(name=victim.name, pid=victim.pid, state=control_pb2.PROCESS_STATE_PENDING)
        back = control_pb2.Process(name=victim.name, pid=1, state=control_pb2.PROCESS_STATE_READY)
        self._seen = iter([away, back])

    async def observe_routers(self) -> Observation:
        topology = control_pb2.GetTopologyResponse(processes=[next(self._seen)])
        model = inference_pb2.GetModelInfoResponse()
        return Observation(0.0, model, (), {}, {}, topology=topology)


async def drilled(process: subprocess.Popen[bytes], expected: str, flow: WordFlow | None = None) -> Drill:
    victim = control_pb2.Process(name="expert-worker-1", pid=process.pid)
    async with running(FakeRouter()) as link, Client(link.address) as client:
        return await run_drill(
            client,
            cast(Observer, FakeObserver(victim)),
            victim,
            "ab",
            {"max_tokens": len(TEXT)},
            expected=expected,
            kill_after=2,
            flow=flow,
        )


async def test_the_worker_is_killed_and_its_return_awaited(process: subprocess.Popen[bytes]) -> None:
    drill = await drilled(process, TEXT)
    assert process.wait(60) == -signal.SIGKILL
    assert (drill.worker, drill.pid, drill.killed_after_tokens) == ("expert-worker-1", process.pid, 2)
    assert drill.same_text
    assert drill.back_after_s is not None


async def test_another_text_is_not_called_the_same(process: subprocess.Popen[bytes]) -> None:
    assert not (await drilled(process, "abacus")).same_text


async def test_the_kill_is_shown_where_it_happens(process: subprocess.Popen[bytes]) -> None:
    out = Console(file=io.StringIO(), width=80)
    await drilled(process, TEXT, WordFlow(out))
    assert isinstance(out.file, io.StringIO)
    shown = out.file.getvalue()
    assert f"kill -9 expert-worker-1 (process {process.pid})\n" in shown
    assert shown.replace("\n", "").endswith(TEXT)


def test_the_longest_pause_is_between_two_tokens_of_the_stream() -> None:
    times = iter([5.0, 5.1, 5.6, 5.7])
    pauses = PauseClock(lambda: next(times))
    for _ in range(4):
        pauses.token()
    assert pauses.longest_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("same", "back", "says"),
    [
        (
            True,
            4.04,
            "same text as without the kill: yes; longest pause 71 ms\nexpert-worker-1 is back 4.0 s",
        ),
        (False, None, "same text as without the kill: no; longest pause 71 ms\nexpert-worker-1 is not back"),
    ],
)
def test_the_outcome_is_told(same: bool, back: float | None, says: str) -> None:
    out = Console(file=io.StringIO(), width=80)
    _print_drill(out, Drill("expert-worker-1", 7, 2, same, 0.0712, back))
    assert isinstance(out.file, io.StringIO)
    assert says in out.file.getvalue()


def test_another_text_is_an_error() -> None:
    _refuse_other_text(None)
    _refuse_other_text(Drill("expert-worker-1", 7, 2, True, 0.07, 4.0))
    with pytest.raises(DataLoss, match="since expert-worker-1 was killed"):
        _refuse_other_text(Drill("expert-worker-1", 7, 2, False, 0.07, 4.0))


@pytest.mark.parametrize(
    ("settings", "num_tokens", "can"),
    [
        (ClusterSettings(replicas=2), 60, True),
        (ClusterSettings(replicas=1), 60, False),
        (ClusterSettings(replicas=2, address="10.0.0.1:6379"), 60, False),
        (ClusterSettings(replicas=2), 2, False),
    ],
)
def test_nobody_is_killed_without_a_second_copy_on_this_machine(
    settings: ClusterSettings, num_tokens: int, can: bool
) -> None:
    assert _can_survive_a_kill(settings, StreamedAnswer("", num_tokens, 1.0)) is can

"""`moesaic drill`, a short one: no answer is lost and no token wrong, whatever dies in the middle of whatever.

Pauses are not judged here: they are those of whatever machine runs the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serve_command import MOESAIC, ROOT, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

DRILL = (*MOESAIC, "drill", "--workers", "4", "--replicas", "2", "--seed", "1")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        yield Path(temp)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(folder)}


def drill(folder: Path, faults: str) -> subprocess.CompletedProcess[str]:
    """A short drill of its own cluster, that came to its end; whether every bound holds is not judged."""
    done = subprocess.run(
        [*DRILL, "--fault", faults, "--minutes", "0.1", "--json"],
        capture_output=True,
        text=True,
        timeout=270,
        env=environment(folder),
        start_new_session=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return done


def test_killed_and_frozen_workers_cost_no_answer_and_no_token(folder: Path) -> None:
    done = drill(folder, "kill,freeze")
    report = json.loads(done.stdout)
    assert [case["title"] for case in report["cases"]] == ["kill", "freeze"], done.stderr
    for case in report["cases"]:
        figures, load = case["figures"], case["under_load"]
        assert load["faults"] >= 1
        assert load["tally"]["requests"] > 0
        assert (figures["lost"], figures["wrong_tokens"], figures["mixed"]) == (0, 0, 0), case
        assert (load["control"]["lost"], load["control"]["wrong_tokens"], load["control"]["mixed"]) == (
            0,
            0,
            0,
        )
        assert (figures["not_recovered"], figures["left_behind"]) == (0, 0)
    assert list(folder.iterdir()) == []


def test_neither_a_fault_amid_a_change_nor_a_lost_head_costs_an_answer_or_a_token(folder: Path) -> None:
    swap, head = json.loads(drill(folder, "swap,head").stdout)["cases"]
    for case in (swap, head):
        figures = case["figures"]
        assert case["under_load"]["faults"] >= 1
        assert case["under_load"]["tally"]["requests"] > 0
        assert (figures["lost"], figures["wrong_tokens"], figures["mixed"]) == (0, 0, 0), case
        assert (figures["torn"], figures["not_recovered"], figures["left_behind"]) == (0, 0, 0), case
    assert sum(swap["changes"].values()) == swap["under_load"]["faults"]
    assert list(folder.iterdir()) == []


def test_a_drill_that_is_interrupted_leaves_no_process_and_no_file(folder: Path) -> None:
    log = folder.with_suffix(".log")
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*DRILL, "--fault", "freeze", "--minutes", "1"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment(folder),
            start_new_session=True,
        ) as drill,
    ):
        try:
            until(lambda: "control" in log.read_text() or drill.poll() is not None, 180.0, "no load")
        finally:  # also where it never came that far, so that nothing outlives the test
            drill.send_signal(signal.SIGTERM)
            code = drill.wait(90)
    assert code == 0
    assert log.read_text().endswith("stopped\n")
    log.unlink()
    assert list(folder.iterdir()) == []

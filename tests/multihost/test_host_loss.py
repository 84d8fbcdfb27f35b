"""A host that has workers is cut off, both ways and one way, or dies, and no answer is lost and no token wrong.

What each cost is printed (`pytest -rP`). Pauses are not judged here: they are those of whatever machine runs the tests.
MOESAIC_CUTS=10 MOESAIC_CUT_S=20 asks for more and longer cuts than one of a few seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import host_load_program
from support.hosts import ROOT, Hosts, HostServe, running_hosts, serving_on

from cluster.checkpoints.model_source import DEMO_MODEL

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.timeout(1800),
    # The processes that hosts consist of outlive the objects that started them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LOAD_PROGRAM = Path(host_load_program.__file__)
CUTS = int(os.environ.get("MOESAIC_CUTS", "1"))
CUT_S = float(os.environ.get("MOESAIC_CUT_S", "6"))
CONTROL_S, REST_S = 9.0, 5.0
END_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with running_hosts(3) as hosts:
        for host in "abc":
            hosts.run(host, "cp", "-r", str(DEMO_MODEL), "/tmp/model")
            hosts.start_ray(host)
        yield hosts


@pytest.fixture(scope="module")
def serve(hosts: Hosts) -> Iterator[HostServe]:
    """A worker on every host; router and controller on the first."""
    with serving_on(hosts, "a", "/tmp/model", "--workers", "3", "--replicas", "2") as serve:
        serve.wait_ready()
        assert {process["node"] for process in serve.processes().values()} == set(map(hosts.address, "abc"))
        yield serve


@pytest.mark.parametrize("way", ["both", "in", "out"])
def test_a_host_that_is_cut_off_costs_no_answer_and_no_token(
    hosts: Hosts, serve: HostServe, way: str
) -> None:
    workers = workers_on(serve, hosts.address("c"))
    with loaded(hosts, serve, workers) as load:
        for _ in range(CUTS):
            hosts.lab.cut("c", way)
            tell(load, "cut")
            time.sleep(CUT_S)
            hosts.lab.heal("c")
            tell(load, "healed")
            time.sleep(REST_S)
        seen = figures(load)
    show(f"c cut off {way} {CUTS} times for {CUT_S:g} s", seen)
    assert all(seconds is not None for seconds in seen["unused_s"]), seen


def test_a_host_that_dies_costs_no_answer_and_no_token(hosts: Hosts, serve: HostServe) -> None:
    workers = workers_on(serve, hosts.address("c"))
    with loaded(hosts, serve, workers) as load:
        hosts.lab.off("c")
        tell(load, "cut")
        time.sleep(CUT_S + REST_S)
        seen = figures(load)
    show("c off", seen)


def loaded(hosts: Hosts, serve: HostServe, workers: Collection[str]) -> subprocess.Popen[str]:
    """The load, at the moment at which its control is over."""
    arguments = [f"http://{serve.http}", serve.grpc, str(CONTROL_S), ",".join(workers)]
    load: subprocess.Popen[str] = hosts.lab.start(
        serve.host,
        [sys.executable, str(LOAD_PROGRAM), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
    )
    assert load.stdout is not None
    assert load.stdout.readline() == "now\n"
    return load


def tell(load: subprocess.Popen[str], word: str) -> None:
    """Says what was done to the host just now."""
    assert load.stdin is not None
    print(word, file=load.stdin, flush=True)


def figures(load: subprocess.Popen[str]) -> dict[str, Any]:
    """What the load saw, of which nothing was lost with the host."""
    printed, _ = load.communicate("end\n", timeout=END_TIMEOUT_S)
    seen: dict[str, Any] = json.loads(printed)
    assert (seen["lost"], seen["wrong_tokens"], seen["mixed"]) == (0, 0, 0), seen
    assert seen["requests"] > 0
    assert seen["share"] > 0
    return seen


def workers_on(serve: HostServe, address: str) -> set[str]:
    """By name, on the host of that address."""
    return {
        name
        for name, process in serve.processes().items()
        if process["node"] == address and name.startswith("expert-worker")
    }


def show(what: str, seen: dict[str, Any]) -> None:
    """Prints what it cost."""
    print(f"{what}, with {seen['share']:.0%} of the calls: {seen['lost']} lost of {seen['requests']}")
    for name in ("control", "cut", "after"):
        of = seen[name]
        if of["pause_s"] is not None:
            print(
                f"  {name}: longest pause {of['pause_s']:.2f} s, gap p99 {1000 * of['gap_p99_s']:.0f} ms, "
                f"{of['tokens_per_s']:.0f} tokens/s"
            )
    print(f"  seconds until its workers had calls again: {seen['unused_s']}")

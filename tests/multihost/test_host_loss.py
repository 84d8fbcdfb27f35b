"""A host that has workers is cut off, both ways and one way, or dies, and no answer is lost and no token wrong.

What each cost is printed (`pytest -rP`). Pauses are not judged here: they are those of whatever machine runs the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import host_load_program
from support.hosts import ROOT, Hosts, HostServe, running_hosts, serving_on

from cluster.checkpoints.model_source import DEMO_MODEL

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.timeout(900),
    # The processes that hosts consist of outlive the objects that started them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LOAD_PROGRAM = Path(host_load_program.__file__)
# Of which the last third comes after the host was let back in.
SPELL_S, CUT_S = 9.0, 6.0


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
    with loaded(hosts, serve) as load:
        hosts.lab.cut("c", way)
        time.sleep(CUT_S)
        hosts.lab.heal("c")
        check(f"c cut off {way} for {CUT_S:g} s", workers, load)


def test_a_host_that_dies_costs_no_answer_and_no_token(hosts: Hosts, serve: HostServe) -> None:
    workers = workers_on(serve, hosts.address("c"))
    with loaded(hosts, serve) as load:
        hosts.lab.off("c")
        check("c off", workers, load)


def loaded(hosts: Hosts, serve: HostServe) -> subprocess.Popen[str]:
    """The load, at the moment at which its control is over."""
    load: subprocess.Popen[str] = hosts.lab.start(
        serve.host,
        [sys.executable, str(LOAD_PROGRAM), f"http://{serve.http}", serve.grpc, str(SPELL_S)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
    )
    assert load.stdout is not None
    assert load.stdout.readline() == "now\n"
    return load


def workers_on(serve: HostServe, address: str) -> set[str]:
    """By name, on the host of that address."""
    return {
        name
        for name, process in serve.processes().items()
        if process["node"] == address and name.startswith("expert-worker")
    }


def check(what: str, workers: set[str], load: subprocess.Popen[str]) -> None:
    """Nothing was lost with the host of these workers, which had their part in the work."""
    printed, _ = load.communicate(timeout=host_load_program.STREAMS * SPELL_S)
    seen = json.loads(printed)
    share = sum(seen["calls"].get(name, 0) for name in workers) / sum(seen["calls"].values())
    print(
        f"{what}, which had {share:.0%} of the calls: {seen['lost']} lost of {seen['requests']}, {seen['wrong_tokens']} wrong tokens, longest pause "
        f"{seen['pause_s']:.2f} s (control {seen['control_pause_s']:.2f}), gap p99 {1000 * seen['gap_p99_s']:.0f} ms "
        f"(control {1000 * seen['control_gap_p99_s']:.0f}), {seen['tokens_per_s']:.0f} tokens/s "
        f"(control {seen['control_tokens_per_s']:.0f})"
    )
    assert (seen["lost"], seen["wrong_tokens"], seen["mixed"]) == (0, 0, 0), seen
    assert seen["requests"] > 0
    assert share > 0

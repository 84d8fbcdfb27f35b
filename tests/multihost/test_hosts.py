"""A cluster of three hosts: where things are put, what is refused, and what a fault of the network may not take."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import stream_program
from support.hosts import ROOT, Hosts, running_hosts, serving_on
from support.serve_command import MOESAIC

from cluster.checkpoints.model_source import DEMO_MODEL

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.timeout(900),
    # The processes that hosts consist of outlive the objects that started them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STREAM_PROGRAM = Path(stream_program.__file__)
# Longer than it takes to find a worker silent twice, shorter than it takes Ray to declare a host dead.
CUT_S = 16.0
# A sitecustomize, which Python imports first, for a host on which Moesaic is not installed.
WITHOUT_MOESAIC = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cluster", "moesaic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with running_hosts(3) as hosts:
        for host in "abc":
            hosts.run(host, "cp", "-r", str(DEMO_MODEL), "/tmp/model")
            hosts.start_ray(host)
        yield hosts


def streams(hosts: Hosts, host: str, target: str, seconds: float) -> subprocess.Popen[str]:
    process: subprocess.Popen[str] = hosts.lab.start(
        host,
        [sys.executable, str(STREAM_PROGRAM), target, "4", str(seconds)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
    )
    return process


def test_copies_of_an_expert_are_on_different_hosts_and_the_controller_beside_the_router(
    hosts: Hosts,
) -> None:
    with serving_on(hosts, "a", "/tmp/model", "--workers", "6", "--replicas", "2") as serve:
        serve.wait_ready()
        processes = serve.processes()
    nodes: dict[tuple[int, int], set[str]] = {}
    for process in processes.values():
        for expert in process.get("experts", []):
            nodes.setdefault((expert.get("layer", 0), expert.get("slot", 0)), set()).add(process["node"])
    assert nodes
    assert {len(held_on) for held_on in nodes.values()} == {2}
    assert processes["controller"]["node"] == processes["router-0"]["node"] == hosts.address("a")


def test_a_cut_that_makes_the_controller_deaf_takes_no_replica_from_a_router_elsewhere(hosts: Hosts) -> None:
    with serving_on(hosts, "a", "/tmp/model", "--workers", "3", "--replicas", "2", "--routers", "2") as serve:
        serve.wait_ready()
        before = serve.topology()
        processes = {process["name"]: process for process in before["processes"]}
        assert processes["controller"]["node"] == hosts.address("a") != processes["router-1"]["node"]
        running = streams(hosts, "c", processes["router-1"]["address"], CUT_S + 6.0)
        time.sleep(2.0)
        hosts.lab.cut("a", "in")
        time.sleep(CUT_S)
        hosts.lab.heal("a")
        printed, _ = running.communicate(timeout=stream_program.TIMEOUT_S + CUT_S)
        seen = json.loads(printed)
        assert seen["errors"] == []
        assert len(seen["answers"]) == 1
        assert serve.topology()["revision"] == before["revision"]


def test_a_drill_cuts_a_host_off_and_no_token_is_wrong_and_nothing_stays_cut(hosts: Hosts) -> None:
    with serving_on(hosts, "a", "/tmp/model", "--workers", "3", "--replicas", "2") as serve:
        serve.wait_ready()
        done = hosts.run(
            "a",
            *(*MOESAIC, "drill", "--http", serve.http, "--grpc", serve.grpc, "--fault", "partition"),
            *("--minutes", "0.4", "--seed", "1", "--json"),
            check=False,
            timeout_s=600.0,
        )
        tables = hosts.run("a", "nft", "list", "tables").stdout
    assert done.returncode in (0, 1), done.stderr  # how long streams pause is not judged here
    (case,) = json.loads(done.stdout)["cases"]
    (mark,) = case["under_load"]["picture"]["marks"]
    assert mark["title"].split()[1].removesuffix(",") in {hosts.address("b"), hosts.address("c")}
    figures = case["figures"]
    assert (figures["lost"], figures["wrong_tokens"], figures["mixed"]) == (0, 0, 0), case
    assert figures["not_recovered"] == 0
    assert "moesaic_drill" not in tables


def test_a_folder_of_other_weights_on_one_host_is_refused_by_its_address(hosts: Hosts) -> None:
    hosts.run("b", sys.executable, "-c", _NEGATE_EXPERTS, "/tmp/model/model.safetensors")
    try:
        with serving_on(hosts, "a", "/tmp/model", "--workers", "3") as serve:
            assert serve.end() != 0
            last = serve.stderr[-1]
            assert hosts.address("b") in last
            assert "the folder of this node is not the one that was checked" in last
            assert serve.stdout == []
    finally:
        hosts.run("b", "cp", "-r", f"{DEMO_MODEL}/.", "/tmp/model")


def test_a_host_that_died_a_moment_ago_is_left_out_and_named(hosts: Hosts) -> None:
    hosts.lab.off("c")
    with serving_on(hosts, "a", "/tmp/model") as serve:
        serve.wait_ready()
        workers = {
            process["node"] for name, process in serve.processes().items() if name.startswith("expert-worker")
        }
        assert workers == {hosts.address("a"), hosts.address("b")}
        assert hosts.address("c") in serve.log


def test_a_host_without_moesaic_is_named_within_the_start(hosts: Hosts) -> None:
    if "c" in hosts.lab.hosts():
        hosts.lab.off("c")
    hosts.lab.boot("c")
    hosts.run("c", "mkdir", "/tmp/without")
    hosts.run("c", "sh", "-c", 'printf %s "$0" > /tmp/without/sitecustomize.py', WITHOUT_MOESAIC)
    hosts.start_ray("c", PYTHONPATH="/tmp/without")
    with serving_on(hosts, "a", "/tmp/model") as serve:
        assert serve.end() != 0
        assert hosts.address("c") in serve.stderr[-1]
        assert "is Moesaic installed there" in serve.stderr[-1]


_NEGATE_EXPERTS = """
import sys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
path = sys.argv[1]
tensors = load_file(path)
for name, tensor in tensors.items():
    if ".experts." in name:
        tensor.neg_()
save_file(tensors, path, metadata={"format": "pt"})
"""

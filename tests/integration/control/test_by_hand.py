"""Experts change under processes that were started by hand: workers, a controller, and a router that follows it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.processes import Process, running_workers

from moesaic import SyncClient, rpc
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertAddress, ExpertVersion, versions_to_proto
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

pytestmark = pytest.mark.timeout(240)

PROMPT = [1, 2, 3, 4]


@contextmanager
def running(module: str, *arguments: str) -> Iterator[Process]:
    process = Process(module, *arguments)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


@contextmanager
def serving(model: Path, state: Path) -> Iterator[tuple[SyncClient, control_pb2_grpc.ControlServiceStub]]:
    """Two workers that hold everything, a controller with this state, and a router."""
    with ExitStack() as stack:
        workers = stack.enter_context(running_workers(model, ["all", "all"]))
        addresses = ",".join(worker.address for worker in workers)
        control = stack.enter_context(
            running(
                "cluster.control",
                *("--model", str(model), "--workers", addresses, "--state", str(state), "--replicas", "2"),
            )
        )
        router = stack.enter_context(
            running(
                "router",
                *("--model", str(model), "--controller", control.address, "--port", "0", "--batch-invariant"),
            )
        )
        channel = stack.enter_context(rpc.channel(control.address))
        yield (
            stack.enter_context(SyncClient(router.address)),
            control_pb2_grpc.ControlServiceStub(channel),
        )


def upload(stub: control_pb2_grpc.ControlServiceStub, bundle: Bundle) -> None:
    def parts() -> Iterator[control_pb2.UploadBundleRequest]:
        yield control_pb2.UploadBundleRequest(manifest=bundle.manifest_bytes)
        yield control_pb2.UploadBundleRequest(weights=bundle.weights_file.read_bytes())

    stub.UploadBundle(parts(), timeout=60)


def change(stub: control_pb2_grpc.ControlServiceStub, **request: Any) -> control_pb2.ChangeResponse:
    """The step at which every router has it."""
    for step in stub.Change(control_pb2.ChangeRequest(**request), timeout=60):
        if step.stage == control_pb2.CHANGE_STAGE_SPREAD and step.done == step.total > 0:
            return step
    raise AssertionError("it never spread")


def test_a_model_is_swapped_grown_and_rolled_back_by_hand_and_comes_back_as_it_was(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path / "tiny")
    legal = make_bundle(tmp_path / "legal", model, [(0, 0), (0, 1), (1, 2)], name="legal", seed=3)
    maths = make_bundle(tmp_path / "maths", model, [(0, None), (1, None)], name="maths", seed=4)

    def tokens(client: SyncClient) -> list[int]:
        return list(client.complete(PROMPT, max_tokens=12, temperature=0).token_ids)

    with serving(model, tmp_path / "state") as (client, stub):
        before = tokens(client)
        upload(stub, legal)
        first = change(stub, kind=control_pb2.CHANGE_KIND_SWAP, bundle=legal.digest).previous_epoch
        swapped = tokens(client)
        upload(stub, maths)
        change(stub, kind=control_pb2.CHANGE_KIND_ADD, bundle=maths.digest)
        grown = tokens(client)
        assert len({tuple(before), tuple(swapped), tuple(grown)}) == 3
    with serving(model, tmp_path / "state") as (client, stub):
        assert tokens(client) == grown
        change(stub, kind=control_pb2.CHANGE_KIND_REMOVE, name="maths")
        assert tokens(client) == swapped
        change(stub, kind=control_pb2.CHANGE_KIND_ROLLBACK, epoch=first)
        assert tokens(client) == before
        with pytest.raises(grpc.RpcError) as refused:
            change(stub, kind=control_pb2.CHANGE_KIND_REMOVE, name="maths")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        words = [entry.what for entry in stub.GetHistory(control_pb2.GetHistoryRequest()).entries]
        assert words == ["refused", "rollback", "remove", "add", "swap", "first"]


def test_a_worker_on_another_host_fetches_the_bundle_from_the_controller_and_probes_it(
    tmp_path: Path,
) -> None:
    """The worker is told no folder, so that it finds the bundle as little as on a host of its own."""
    model = write_mixtral(tmp_path / "tiny")
    legal = make_bundle(tmp_path / "legal", model, [(0, 0), (1, 2)], name="legal", seed=3)
    with ExitStack() as stack:
        (worker,) = stack.enter_context(running_workers(model, ["all"]))
        flags = ("--model", str(model), "--workers", worker.address, "--state", str(tmp_path / "state"))
        control = stack.enter_context(running("cluster.control", *flags))
        upload(control_pb2_grpc.ControlServiceStub(stack.enter_context(rpc.channel(control.address))), legal)
        stub = expert_pb2_grpc.WorkerControlServiceStub(stack.enter_context(rpc.channel(worker.address)))
        where = {"bundle": legal.digest, "control_address": control.address}
        experts = versions_to_proto(
            ExpertVersion(ExpertAddress(one.layer, one.slot), bytes.fromhex(one.version))
            for one in legal.manifest.experts
        )
        loaded = list(stub.Load(expert_pb2.LoadRequest(**where, experts=experts), timeout=60))
        assert [message.expert for message in loaded] == experts
        probed = stub.Probe(expert_pb2.ProbeRequest(**where, experts=experts), timeout=60)
        assert [result.ok for result in probed.results] == [True, True]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "nowhere"], "--workers nowhere: must be HOST:PORT"),
        (["--workers", "h:1,h:1"], "--workers h:1,h:1: must name different workers"),
    ],
)
def test_a_wrong_start_says_why(tmp_path: Path, flags: list[str], message: str) -> None:

    write_mixtral(tmp_path / "tiny")
    command = [sys.executable, "-m", "cluster.control", "--model", str(tmp_path / "tiny"), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2 and run.stderr.startswith(f"error: {message}"), run.stderr

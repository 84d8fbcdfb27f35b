"""Experts change under processes that were started by hand: workers, a controller, and a router that follows it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.expert_calls import ReferenceExperts
from support.processes import Process, running_workers
from support.tiny_tokenizer import byte_level, write_folder

from cluster.control.canary_watch import OPERATOR
from moesaic import SyncClient, rpc
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertAddress, ExpertVersion, versions_to_proto
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

pytestmark = pytest.mark.timeout(240)

PROMPT = [1, 2, 3, 4]
GOLDEN_PROMPTS = "Once upon a time there was a hen.\nnaïve café\ndef main(): return 0\n"
WAIT_S = 60.0


@contextmanager
def running(module: str, *arguments: str) -> Iterator[Process]:
    process = Process(module, *arguments)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


@contextmanager
def serving(
    model: Path, state: Path, *control_flags: str
) -> Iterator[tuple[SyncClient, control_pb2_grpc.ControlServiceStub]]:
    """Two workers that hold everything, a controller with this state, and a router."""
    with ExitStack() as stack:
        workers = stack.enter_context(running_workers(model, ["all", "all"]))
        addresses = ",".join(worker.address for worker in workers)
        control = stack.enter_context(
            running(
                "cluster.control",
                *("--model", str(model), "--workers", addresses, "--state", str(state), "--replicas", "2"),
                *control_flags,
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


def until(
    stub: control_pb2_grpc.ControlServiceStub, holds: Callable[[control_pb2.GetHistoryResponse], bool]
) -> control_pb2.GetHistoryResponse:
    """The history, as soon as this holds of it."""
    ends_s = time.monotonic() + WAIT_S
    while not holds(history := stub.GetHistory(control_pb2.GetHistoryRequest())):
        assert time.monotonic() < ends_s, history
        time.sleep(0.05)
    return history


def test_golden_prompts_let_a_harmless_canary_stay_and_end_one_that_drifts(tmp_path: Path) -> None:
    model = write_folder(write_mixtral(tmp_path / "tiny", vocab_size=400), byte_level(399))
    prompts = tmp_path / "golden.txt"
    prompts.write_text(GOLDEN_PROMPTS, encoding="utf-8")
    folder = ReferenceExperts(model)

    def scaled(name: str, factor: float) -> Bundle:
        """Every expert of the last layer, whose answers are larger by a factor."""
        weights = {
            (1, slot): {part: folder.weight(1, slot, part).numpy() for part in ("gate", "up")}
            | {"down": factor * folder.weight(1, slot, "down").numpy()}
            for slot in range(4)
        }
        return make_bundle(tmp_path / name, model, weights, name=name, weights=weights)

    harmless, drifting = scaled("harmless", 1.001), scaled("drifting", 20.0)
    with serving(model, tmp_path / "state", "--golden-prompts", str(prompts)) as (_, stub):
        trial = {"kind": control_pb2.CHANGE_KIND_SWAP, "canary": True, "share": 0.1}
        upload(stub, harmless)
        change(stub, bundle=harmless.digest, **trial)
        measured = until(stub, lambda history: "golden prompts drift by" in history.canary_figures)
        assert " requests finished, 0 failed; " in measured.canary_figures
        assert [entry.what for entry in measured.entries] == ["canary", "first"]
        promoted = change(stub, kind=control_pb2.CHANGE_KIND_PROMOTE)
        upload(stub, drifting)
        tried = change(stub, bundle=drifting.digest, **trial)
        ended = until(stub, lambda history: not history.canary)
        assert ended.epoch == promoted.epoch == measured.canary
        decision = ended.entries[0]
        assert (decision.what, decision.operator) == ("rollback", OPERATOR)
        assert decision.previous_epoch == tried.epoch
        assert re.fullmatch(
            r"golden prompts drift by [\d.]+ nats a token, the limit is 0\.5", decision.detail
        )


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

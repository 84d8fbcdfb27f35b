"""`moesaic serve --state DIR`: experts change over Ray, and a restart of anything comes back in the last committed epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.bundles import make_bundle
from support.serve_command import serving, until

from moesaic import SyncClient, rpc
from moesaic.bundles import Bundle
from moesaic.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPT = [1, 2, 3, 4]


class Cluster:
    """A cluster with its state in a folder, and what a person does to it."""

    def __init__(self, router: str) -> None:
        self.router = router

    @contextmanager
    def control(self) -> Iterator[control_pb2_grpc.ControlServiceStub]:
        with rpc.channel(self.router) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            address = stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=10).control_address
        with rpc.channel(address) as channel:
            yield control_pb2_grpc.ControlServiceStub(channel)

    def topology(self) -> control_pb2.GetTopologyResponse | None:
        try:
            with self.control() as stub:
                answer: control_pb2.GetTopologyResponse = stub.GetTopology(
                    control_pb2.GetTopologyRequest(), timeout=5
                )
                return answer
        except grpc.RpcError:
            return None

    def upload(self, bundle: Bundle) -> None:
        def parts() -> Iterator[control_pb2.UploadBundleRequest]:
            yield control_pb2.UploadBundleRequest(manifest=bundle.manifest_bytes)
            yield control_pb2.UploadBundleRequest(weights=bundle.weights_file.read_bytes())

        with self.control() as stub:
            stub.UploadBundle(parts(), timeout=60)

    def change(self, **request: Any) -> list[control_pb2.ChangeResponse]:
        """Up to the step at which every router has it."""
        steps = []
        with self.control() as stub:
            for step in stub.Change(control_pb2.ChangeRequest(**request), timeout=60):
                steps.append(step)
                if step.stage == control_pb2.CHANGE_STAGE_SPREAD and step.done == step.total > 0:
                    return steps
        raise AssertionError(f"it never spread: {steps}")

    def tokens(self) -> list[int]:
        with SyncClient(self.router) as client:
            return list(client.complete(PROMPT, max_tokens=12, temperature=0).token_ids)


@contextmanager
def cluster(model: Path, state: Path) -> Iterator[Cluster]:
    flags = ("--workers", "2", "--routers", "2", "--replicas", "2", "--state", str(state))
    with serving(str(model), *flags) as serve:
        serve.wait_ready()
        yield Cluster(serve.grpc)
        serve.popen.send_signal(signal.SIGTERM)
        assert serve.end() == 0
        serve.assert_nothing_is_left()


def test_experts_change_over_ray_and_every_restart_comes_back_in_the_last_epoch(
    tiny: Path, tmp_path: Path
) -> None:
    legal = make_bundle(tmp_path / "legal", tiny, [(0, 0), (0, 1), (1, 2)], name="legal", seed=3)
    maths = make_bundle(tmp_path / "maths", tiny, [(0, None), (1, None)], name="maths", seed=4)
    with cluster(tiny, tmp_path / "state") as running:
        before = running.tokens()
        running.upload(legal)
        steps = running.change(kind=control_pb2.CHANGE_KIND_SWAP, bundle=legal.digest)
        assert steps[-1].total == 2
        swapped = running.tokens()
        assert swapped != before
        running.upload(maths)
        running.change(kind=control_pb2.CHANGE_KIND_ADD, bundle=maths.digest)
        grown, epoch = running.tokens(), running.topology().epoch  # type: ignore[union-attr]
        for name in ("controller", "expert-worker-1"):
            kill(running, name)
            assert running.topology().epoch == epoch  # type: ignore[union-attr]
            assert running.tokens() == grown
    with cluster(tiny, tmp_path / "state") as running:
        assert running.topology().epoch == epoch  # type: ignore[union-attr]
        assert running.tokens() == grown
        running.change(kind=control_pb2.CHANGE_KIND_REMOVE, name="maths")
        assert running.tokens() == swapped


def kill(running: Cluster, name: str) -> None:
    """Returns when the process is READY again."""
    topology = running.topology()
    assert topology is not None
    pid = next(process.pid for process in topology.processes if process.name == name)
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        now = running.topology()
        return now is not None and any(
            process.name == name and process.pid != pid and process.state == control_pb2.PROCESS_STATE_READY
            for process in now.processes
        )

    until(is_back, 90.0, f"{name} again")

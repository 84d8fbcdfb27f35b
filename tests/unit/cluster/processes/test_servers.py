"""What a process makes its server of, on the node that it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.processes.host import ProcessHost
from cluster.processes.servers import ProcessContext, make_server
from cluster.processes.specs import ExpertWorkerSpec
from expert_worker.config import WorkerConfig
from moesaic.settings import WorkerSettings
from moesaic.v1 import control_pb2


class NoPeers:
    """A worker asks nobody."""

    async def report(self, name: str, seen: int, hold_s: float) -> None:
        raise AssertionError

    async def address(self, name: str) -> str:
        raise AssertionError


async def test_a_node_that_cannot_have_the_model_of_the_hub_fails_its_process_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = WorkerConfig(
        name="expert-worker-0",
        model=Path("/cache/of/the/first/node/snapshots/0123456789abcdef0123456789abcdef01234567"),
        experts=frozenset(),
        host="127.0.0.1",
        port=0,
        device="cpu",
        dtype="auto",
        settings=WorkerSettings(),
    )
    context = ProcessContext(node="10.0.0.2", restarts=0, peers=NoPeers())
    spec = ExpertWorkerSpec(config, "hf://tiny/mixtral")
    host = ProcessHost(
        config.name, lambda on_change: make_server(spec, context, on_change), node=context.node, restarts=0
    )
    assert not await host._try_start()
    report = await host.report(seen=0, hold_s=0.0)
    assert (report.state, report.node) == (control_pb2.PROCESS_STATE_FAILED, "10.0.0.2")
    assert report.detail.startswith("model: hf://tiny/mixtral is not on this node: ")

"""A low-rank adapter, packed by the one side of Moesaic and computed by the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from support.checkpoints import write_mixtral

from cluster.bundles.order import Order
from cluster.bundles.pack import pack
from cluster.bundles.selection import Wanted
from expert_worker.config import WorkerConfig
from expert_worker.server import WorkerServer
from moesaic import rpc
from moesaic.epoch import ExpertAddress, ExpertVersion, version_to_proto
from moesaic.settings import WorkerSettings
from moesaic.v1 import expert_pb2, expert_pb2_grpc

EXPERT = "base_model.model.model.layers.1.block_sparse_moe.experts.3."


async def test_a_worker_makes_the_expert_that_the_adapter_was_trained_to_be(tmp_path: Path) -> None:
    base = write_mixtral(tmp_path / "base")
    adapter, random = tmp_path / "adapter", np.random.default_rng(0)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    shapes = {"w1.lora_A": (2, 32), "w1.lora_B": (24, 2), "w2.lora_A": (2, 24), "w2.lora_B": (32, 2)}
    factors = {
        f"{EXPERT}{name}.weight": random.standard_normal(shape).astype("f4") for name, shape in shapes.items()
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    bundle = pack(Order(adapter, base, tmp_path / "bundle", wanted=Wanted(into="new"))).bundle
    version = bytes.fromhex(bundle.manifest.experts[0].version)
    wanted = [version_to_proto(ExpertVersion(ExpertAddress(1, 4), version))]
    where = {"bundle": bundle.digest, "folder": str(bundle.folder)}
    share = frozenset({ExpertAddress(0, 0)})  # the base slot itself is another worker's
    server = WorkerServer(WorkerConfig("w", base, share, "127.0.0.1", 0, "cpu", "auto", WorkerSettings()))
    address = await server.start()
    await server.load()
    async with rpc.aio_channel(address) as channel:
        stub = expert_pb2_grpc.WorkerControlServiceStub(channel)
        request = expert_pb2.LoadRequest(experts=wanted, **where)
        steps = [step async for step in stub.Load(request, timeout=30)]
        probed = await stub.Probe(expert_pb2.ProbeRequest(experts=wanted, **where), timeout=30)
    await server.stop(0)
    assert len(steps) == 1
    assert probed.results[0].ok, probed

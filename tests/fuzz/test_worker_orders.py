"""What a controller says to a worker: orders to load, probe and give up experts, and the bundle that it sends for them.

An order is a letter that says which one, and the message. A bundle is the messages of FetchBundle; it is asked for by the
digest of the manifest that comes, because any other one is refused at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import strategies as st
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.fuzzing import fuzzed, refusals
from support.message_lists import join, parsed, split
from support.mutations import bytes_near, json_near, message_near

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.experts.bundle_source import BundleSource
from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.lifecycle import ExpertLifecycle
from expert_worker.experts.load_threads import start_load_threads
from expert_worker.experts.loader import ExpertLoader, load_experts
from expert_worker.experts.stack import ExpertStacks
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.control_service import Controlled, WorkerControlService
from moesaic import rpc
from moesaic.addresses import split_address
from moesaic.bundles import Bundle, Manifest
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress, ExpertVersion, version_from_proto, version_to_proto
from moesaic.errors import MoesaicError
from moesaic.families import describe_model
from moesaic.v1 import control_pb2, expert_pb2

HOME = (ExpertAddress(0, 1), ExpertAddress(1, 3))
# A new expert's slot: the first above those of the model.
NEW = 4
FORM = ExpertForm(torch.device("cpu"), torch.float32)
# What stands in an order for the bundle's folder, and for HOST:PORT of the controller.
FOLDER, CONTROLLER = "folder", "controller:1"
PIECES = 3
PLACE = tempfile.TemporaryDirectory()


@cache
def models() -> tuple[Path, Bundle]:
    """A folder of two layers of four experts, and a bundle that adds a slot and takes another's place."""
    folder = write_mixtral(Path(PLACE.name) / "tiny", hidden_size=16, intermediate_size=4, head_dim=4)
    return folder, make_bundle(folder.parent / "maths-v1", folder, [(0, None), (1, 2)])


def versions_of(manifest: Manifest) -> list[ExpertVersion]:
    return [
        ExpertVersion(
            ExpertAddress(expert.layer, NEW if expert.slot is None else expert.slot),
            bytes.fromhex(expert.version),
        )
        for expert in manifest.experts
    ]


class Worker:
    """A worker that holds HOME, and a controller that sends it what an input says."""

    def __init__(self) -> None:
        folder, _ = models()
        checkpoint = open_checkpoint(folder)
        model = describe_model(checkpoint)
        self.store = ExpertStore()
        for address, held in load_experts(checkpoint, model, HOME, FORM):
            self.store.add(address, held)
        self.home = set(self.store.experts())
        self.fetched: list[bytes] = []
        self.address = ""
        self._batcher = Batcher(compute_calls, max_queued_calls=8, max_pass_rows=64)
        lifecycle = ExpertLifecycle(
            ExpertLoader(checkpoint, model, FORM),
            self.store,
            ExpertStacks(FORM),
            start_load_threads(1),
            lambda: 1 << 30,
        )
        self._service = WorkerControlService(BundleSource(keep_s=0, retry_period_s=0))
        self._service.open(Controlled(lifecycle, self.store, self._batcher, model, FORM))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Worker]:
        controller = rpc.Server({rpc.CONTROL_SERVICE: self._add_controller})
        self.address = f"127.0.0.1:{await controller.start('127.0.0.1', 0)}"
        self._batcher.start()
        try:
            yield self
        finally:
            self._service.close()
            await self._batcher.stop(0)
            await controller.stop(0)

    def _add_controller(self, server: grpc.aio.Server) -> None:
        async def fetch(request: bytes, context: object) -> AsyncIterator[bytes]:
            for message in self.fetched:
                yield message

        handlers = {"FetchBundle": grpc.unary_stream_rpc_method_handler(fetch)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(rpc.CONTROL_SERVICE, handlers),)
        )

    async def load(self, order: expert_pb2.LoadRequest) -> None:
        """It holds all that it was told to load, or nothing of it."""
        before = set(self.store.experts())
        try:
            async for step in self._service.Load(order, None):
                step.SerializeToString()
        except MoesaicError:
            assert set(self.store.experts()) == before
            raise
        assert set(self.store.experts()) == before | set(map(version_from_proto, order.experts))

    async def probe(self, order: expert_pb2.ProbeRequest) -> None:
        response = await self._service.Probe(order, None)
        response.SerializeToString()
        assert len(response.results) == len(set(map(version_from_proto, order.experts)))

    async def unload(self, order: expert_pb2.UnloadRequest) -> None:
        await self._service.Unload(order, None)
        assert not set(self.store.experts()) & set(map(version_from_proto, order.experts))

    async def is_as_before(self) -> None:
        """Gives up what was loaded, has what was given up loaded again, and computes with it."""
        with contextlib.suppress(MoesaicError):
            await self._service.Unload(
                expert_pb2.UnloadRequest(
                    experts=map(version_to_proto, set(self.store.experts()) - self.home)
                ),
                None,
            )
        home = [version_to_proto(version) for version in sorted(self.home)]
        await self.load(expert_pb2.LoadRequest(experts=home))
        await self.probe(expert_pb2.ProbeRequest(experts=home))
        assert set(self.store.experts()) == self.home


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def worker(runner: asyncio.Runner) -> Iterator[Worker]:
    serving = Worker().serving()
    yield runner.run(serving.__aenter__())
    runner.run(serving.__aexit__(None, None, None))


def orders() -> st.SearchStrategy[bytes]:
    _, bundle = models()
    brought = [version_to_proto(version) for version in versions_of(bundle.manifest)]
    told = {"experts": brought, "bundle": bundle.digest, "folder": FOLDER, "control_address": CONTROLLER}
    whole = {
        b"L": expert_pb2.LoadRequest(**told),
        b"P": expert_pb2.ProbeRequest(**told),
        b"U": expert_pb2.UnloadRequest(experts=brought),
    }
    near = [message_near(message).map(letter.__add__) for letter, message in whole.items()]
    return st.one_of(near) | bytes_near(st.one_of(near))


@fuzzed("worker_orders", st.deferred(orders), examples=40)
def test_an_order_is_carried_out_or_refused(raw: bytes, worker: Worker, runner: asyncio.Runner) -> None:
    kinds: dict[bytes, Any] = {
        b"L": (expert_pb2.LoadRequest, worker.load),
        b"P": (expert_pb2.ProbeRequest, worker.probe),
        b"U": (expert_pb2.UnloadRequest, worker.unload),
    }
    kind, obey = kinds.get(raw[:1], kinds[b"L"])
    order = parsed(kind, raw[1:])
    if order is not None:
        worker.fetched = []
        with refusals():
            runner.run(obey(told_by(worker, order)))
        runner.run(worker.is_as_before())


def told_by(worker: Worker, order: Any) -> Any:
    """An order with a real folder; whatever may be an address is that of the controller on this host."""
    if isinstance(order, expert_pb2.UnloadRequest):
        return order
    if order.folder == FOLDER:
        order.folder = str(models()[1].folder)
    with contextlib.suppress(MoesaicError):
        split_address(order.control_address)
        order.control_address = worker.address
    return order


def transfers() -> st.SearchStrategy[bytes]:
    """The manifest, and the weights in pieces."""
    _, bundle = models()
    valid, weights = bundle.manifest_bytes, bundle.weights_file.read_bytes()

    def messages(manifest: bytes, weights: bytes) -> bytes:
        size = -(-len(weights) // PIECES) or 1
        pieces = [weights[start : start + size] for start in range(0, len(weights), size)]
        parts = [{"manifest": manifest}, *({"weights": piece} for piece in pieces)]
        return join(control_pb2.FetchBundleResponse(**part).SerializeToString() for part in parts)

    manifests = st.just(valid) | json_near(json.loads(valid))
    spoilt = st.builds(messages, manifests, st.just(weights) | bytes_near(st.just(weights)))
    return spoilt | bytes_near(spoilt)


@fuzzed("fetched_bundles", st.deferred(transfers), examples=30)
def test_a_bundle_that_is_sent_is_held_as_its_manifest_says_or_refused(
    raw: bytes, worker: Worker, runner: asyncio.Runner
) -> None:
    worker.fetched = split(raw)
    first = parsed(control_pb2.FetchBundleResponse, worker.fetched[0]) if worker.fetched else None
    manifest = first.manifest if first else b""
    versions = versions_of(models()[1].manifest)
    with contextlib.suppress(MoesaicError):
        versions = versions_of(Manifest.from_json(manifest))
    told = {
        "experts": [version_to_proto(version) for version in versions],
        "bundle": hashlib.sha256(manifest).digest(),
        "control_address": worker.address,
    }
    with refusals():
        runner.run(worker.load(expert_pb2.LoadRequest(**told)))
        runner.run(worker.probe(expert_pb2.ProbeRequest(**told)))
    runner.run(worker.is_as_before())

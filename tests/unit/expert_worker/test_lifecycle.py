"""Experts that are loaded, probed and unloaded over gRPC while the worker serves."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from support import bundles as bundles_support
from support.bundles import make_bundle, random_weights
from support.checkpoints import write_mixtral
from support.expert_calls import compute_request
from support.wire_tensors import from_wire

from expert_worker import server as server_module
from expert_worker.config import WorkerConfig
from expert_worker.experts import expert as expert_module
from expert_worker.experts import lifecycle as lifecycle_module
from expert_worker.experts import stack as stack_module
from expert_worker.experts.bundle_source import BundleSource
from expert_worker.experts.stored_weight import Region
from expert_worker.server import WorkerServer
from moesaic import rpc
from moesaic.bundles import Bundle
from moesaic.bundles.manifest import WEIGHTS_FILE
from moesaic.epoch import ExpertAddress, ExpertVersion, version_to_proto, versions_from_proto
from moesaic.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MoesaicError,
    Unavailable,
    from_rpc_error,
)
from moesaic.families.model import ExpertModule
from moesaic.settings import WorkerSettings
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

SHARE = frozenset({ExpertAddress(0, 1), ExpertAddress(1, 3)})
HIDDEN = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
# A new expert's slot: the first above those of the model.
NEW = 4


class Site:
    """A worker that serves, and clients of it."""

    def __init__(self, server: WorkerServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.control = expert_pb2_grpc.WorkerControlServiceStub(channel)
        self.experts = expert_pb2_grpc.ExpertServiceStub(channel)

    async def held(self) -> frozenset[ExpertVersion]:
        described = await self.experts.Describe(expert_pb2.DescribeRequest(), timeout=60)
        return versions_from_proto(described.experts)

    async def load(
        self, versions: Iterable[ExpertVersion], bundle: Bundle | None = None, /, **fields: Any
    ) -> list[expert_pb2.LoadResponse]:
        return [response async for response in self.control.Load(load_request(versions, bundle, **fields))]

    async def refused(
        self, versions: Iterable[ExpertVersion], bundle: Bundle | None = None, /, **fields: Any
    ) -> MoesaicError:
        """Why a load is refused. Nothing changes then."""
        before = await self.held()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.load(versions, bundle, **fields)
        assert await self.held() == before
        return from_rpc_error(caught.value)

    async def unload(self, versions: Iterable[ExpertVersion]) -> None:
        await self.control.Unload(
            expert_pb2.UnloadRequest(experts=map(version_to_proto, versions)), timeout=60
        )

    async def probe(
        self, versions: Iterable[ExpertVersion], bundle: Bundle
    ) -> Sequence[expert_pb2.ProbeResult]:
        request = expert_pb2.ProbeRequest(
            bundle=bundle.digest, experts=map(version_to_proto, versions), folder=str(bundle.folder)
        )
        return (await self.control.Probe(request, timeout=60)).results

    async def compute(self, version: ExpertVersion) -> expert_pb2.ComputeResponse:
        (layer, slot), digest = version
        request = compute_request(HIDDEN, {slot: [0, 2, 5]}, {version.address: digest}, layer=layer)
        stream = self.experts.Compute()
        await stream.write(request)
        response: expert_pb2.ComputeResponse = await asyncio.wait_for(stream.read(), 60)
        stream.cancel()
        return response


def load_request(
    versions: Iterable[ExpertVersion], bundle: Bundle | None, /, **fields: Any
) -> expert_pb2.LoadRequest:
    known = {} if bundle is None else {"bundle": bundle.digest, "folder": str(bundle.folder)}
    return expert_pb2.LoadRequest(experts=map(version_to_proto, versions), **known | fields)


def versions_of(bundle: Bundle, new: int = NEW) -> list[ExpertVersion]:
    return [
        ExpertVersion(
            ExpertAddress(expert.layer, new if expert.slot is None else expert.slot),
            bytes.fromhex(expert.version),
        )
        for expert in bundle.manifest.experts
    ]


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    server = WorkerServer(
        WorkerConfig("w", folder, SHARE, "127.0.0.1", 0, "cpu", "auto", WorkerSettings(**settings))
    )
    address = await server.start()
    await server.load()
    try:
        async with rpc.aio_channel(address) as channel:
            yield Site(server, channel)
    finally:
        await server.stop(0)


@pytest.fixture
async def site(folder: Path) -> AsyncIterator[Site]:
    async with serving(folder) as site:
        yield site


async def test_an_expert_of_a_bundle_is_loaded_probed_computed_and_unloaded(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder, [(0, None), (1, None)])
    versions, before = versions_of(bundle), await site.held()
    revision = site.server.contents_revision
    steps = await site.load(versions, bundle)
    assert [step.expert for step in steps] == [version_to_proto(version) for version in versions]
    assert steps[-1].loaded_bytes == steps[-1].total_bytes > 0
    assert await site.held() == before | set(versions)
    assert site.server.contents_revision == revision + 2
    results = await site.probe(versions, bundle)
    assert [result.ok for result in results] == [True, True]
    assert all(result.max_difference < 1e-4 * result.max_expected for result in results)
    response = await site.compute(versions[1])
    assert not response.HasField("error") and list(response.versions) == [versions[1].digest]
    await site.unload([*versions, ExpertVersion(ExpertAddress(0, 77), bytes(32))])
    assert await site.held() == before
    assert (await site.compute(versions[1])).HasField("error")


async def test_versions_of_the_model_folder_are_given_up_and_asked_for_again(
    site: Site, folder: Path
) -> None:
    (version,) = [version for version in await site.held() if version.address == (0, 1)]
    answer = await site.compute(version)
    await site.unload([version])
    assert version not in await site.held()
    (step,) = await site.load([version])
    assert step.expert == version_to_proto(version)
    assert (await site.compute(version)).output == answer.output
    assert await site.load([version]) == [expert_pb2.LoadResponse(expert=version_to_proto(version))]
    request = expert_pb2.ProbeRequest(experts=[version_to_proto(version)])
    (result,) = (await site.control.Probe(request)).results
    assert result.ok and result.max_difference == 0 and result.max_expected > 0
    refused = await site.refused([ExpertVersion(ExpertAddress(0, 2), version.digest)])
    assert (refused.code.name, refused.reason) == ("FAILED_PRECONDITION", "WRONG_VERSION")
    assert "slot 9" in (await site.refused([ExpertVersion(ExpertAddress(0, 9), version.digest)])).message


async def test_a_swapped_version_lies_beside_the_one_that_it_will_replace(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder, [(0, 1)])
    (old,) = [version for version in await site.held() if version.address == (0, 1)]
    (new,) = versions_of(bundle)
    await site.load([new], bundle)
    assert (await site.compute(old)).output != (await site.compute(new)).output
    request = compute_request(HIDDEN, {1: [0]}, {old.address: old.digest})
    request.experts.add(slot=1, version=new.digest, rows=[0])
    request.epoch = "one,two"
    stream = site.experts.Compute()
    await stream.write(request)
    response = await asyncio.wait_for(stream.read(), 60)
    stream.cancel()
    assert (response.epoch, list(response.versions)) == ("one,two", [old.digest, new.digest])
    assert not torch.equal(*from_wire(response.output).split(1))


@pytest.mark.parametrize(("spare", "num_passes"), [(1, 1), (0, 2)])
async def test_what_is_loaded_later_is_computed_with_the_stack_of_its_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, num_passes: int
) -> None:
    """As on CUDA. The kernel that is used there also runs on a CPU, in float32."""
    monkeypatch.setattr(stack_module, "can_stack", lambda form, module: True)
    passes: list[int] = []
    grouped = expert_module._compute_grouped

    def note(stack: Any, experts: Sequence[Any], *rest: Any) -> torch.Tensor:
        passes.append(len(experts))
        return grouped(stack, experts, *rest)

    monkeypatch.setattr(expert_module, "_compute_grouped", note)
    bundle, later = make_bundle(tmp_path / "b", folder), make_bundle(tmp_path / "c", folder, seed=1)
    async with serving(folder, spare_experts=spare) as site:
        (held,) = [version for version in await site.held() if version.address == (0, 1)]
        for of in (bundle, later):
            (version,) = versions_of(of)
            await site.load([version], of)
            (result,) = await site.probe([version], of)
            assert result.ok
            passes.clear()
            request = compute_request(HIDDEN, {1: [0, 3]}, {held.address: held.digest})
            request.experts.add(slot=NEW, version=version.digest, rows=[1])
            stream = site.experts.Compute()
            await stream.write(request)
            response = await asyncio.wait_for(stream.read(), 60)
            stream.cancel()
            assert not response.HasField("error") and len(passes) == num_passes
            # Its row is free again for the next one.
            await site.unload([version])


async def test_what_a_bundle_does_not_have_is_refused(site: Site, folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", folder, [(0, None)])
    (version,) = versions_of(bundle)
    for wrong in (
        ExpertVersion(version.address, bytes(32)),
        ExpertVersion(ExpertAddress(1, NEW), version.digest),
    ):
        assert (await site.refused([version, wrong], bundle)).field == "experts"
    assert (await site.refused([], bundle)).message == "experts: must not be empty"
    assert (await site.refused([version], bundle, bundle=b"short")).field == "bundle"
    not_here = await site.refused([version], bundle, folder=str(tmp_path / "elsewhere"))
    assert not_here.reason == "BUNDLE_NOT_FOUND"
    assert (await site.refused([version], bundle, bundle=bytes(32))).reason == "BUNDLE_NOT_FOUND"


def rewritten(bundle: Bundle, change: Any) -> Bundle:
    """The bundle after a change of its weights' bytes, of which its manifest knows nothing."""
    file = bundle.folder / WEIGHTS_FILE
    file.write_bytes(change(bytearray(file.read_bytes())))
    return bundle


def flipped(content: bytearray) -> bytearray:
    content[-1] ^= 1
    return content


async def test_weights_that_are_not_those_of_the_manifest_leave_nothing(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    # Only the last tensor of the file is wrong, so that the other expert was whole already.
    bundle = rewritten(make_bundle(tmp_path / "b", folder, [(0, 0), (1, 0)]), flipped)
    refused = await site.refused(versions_of(bundle), bundle)
    assert (refused.code.name, refused.reason, refused.field) == ("DATA_LOSS", "BUNDLE_DIGEST", "bundle")
    assert "tensor 1.0.1.up" in refused.message
    assert await site.load(versions_of(bundle)[:1], bundle)  # the other one is as it should be


async def test_a_truncated_bundle_is_not_taken_from_its_folder(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = rewritten(make_bundle(tmp_path / "b", folder), lambda content: content[:-4])
    assert (await site.refused(versions_of(bundle), bundle)).reason == "BUNDLE_NOT_FOUND"


async def test_weights_that_are_not_finite_are_refused(site: Site, folder: Path, tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["down"][3, 4] = np.nan
    bundle = make_bundle(tmp_path / "b", folder, [(0, None)], weights={(0, None): weights})
    refused = await site.refused(versions_of(bundle), bundle)
    assert (refused.reason, "NaN" in refused.message) == ("BAD_CHECKPOINT", True)


def tiny_weights(seed: int = 5) -> dict[str, np.ndarray]:
    return random_weights(ExpertModule(32, 24, "silu"), seed)


async def test_what_does_not_fit_is_refused_with_what_is_missing_before_anything_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10_000]
    monkeypatch.setattr(server_module, "free_memory", lambda device: free[0])
    bundle = make_bundle(tmp_path / "b", folder, [(0, None), (1, None)])
    async with serving(folder) as site:
        described = await site.experts.Describe(expert_pb2.DescribeRequest())
        assert described.available_bytes == 10_000
        refused = await site.refused(versions_of(bundle), bundle)
        assert refused.reason == "OUT_OF_MEMORY"
        assert refused.message.startswith("experts: 2 experts need ")
        needed = int(refused.message.split()[4])
        assert refused.message.endswith(f"10000 are free: {needed - 10_000} are missing")
        assert needed > 2 * 3 * 32 * 24 * 4
        free[0] = needed
        assert len(await site.load(versions_of(bundle), bundle)) == 2


class SlowReads:
    """Reads of weights that wait while they are held up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._read = Region.read
        monkeypatch.setattr(Region, "read", lambda *args: self.read(*args))

    def read(self, *args: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return self._read(*args)


async def test_a_stop_ends_a_load(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    async with serving(folder) as site:
        reads = SlowReads(monkeypatch)
        loading = asyncio.create_task(site.load(versions_of(bundle), bundle))
        assert await asyncio.to_thread(reads.begun.wait, 60)
        stopping = asyncio.create_task(site.server.stop(5))
        await asyncio.sleep(0)
        reads.go_on.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await loading
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await stopping
        assert site.server._served is not None and len(site.server._served.experts()) == len(SHARE)


async def test_a_caller_that_goes_away_leaves_nothing_and_the_next_one_loads(
    site: Site, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, before = make_bundle(tmp_path / "b", folder, [(0, None), (1, None)]), await site.held()
    versions, reads = versions_of(bundle), SlowReads(monkeypatch)
    gone = site.control.Load(load_request(versions, bundle))
    reading = asyncio.create_task(gone.read())
    assert await asyncio.to_thread(reads.begun.wait, 60)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    waiting = asyncio.create_task(site.load(versions[:1], bundle))
    await asyncio.sleep(0.02)
    assert await site.held() == before and not waiting.done()
    reads.go_on.set()
    assert len(await waiting) == 1
    assert await site.held() == before | set(versions[:1])


async def test_only_so_many_loads_wait(
    site: Site, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, reads = make_bundle(tmp_path / "b", folder), SlowReads(monkeypatch)
    monkeypatch.setattr(lifecycle_module, "MAX_WAITING", 1)
    versions = versions_of(bundle)
    first = asyncio.create_task(site.load(versions, bundle))
    assert await asyncio.to_thread(reads.begun.wait, 60)
    second = asyncio.create_task(site.load(versions, bundle))
    lifecycle = site.server._control._controlled.lifecycle  # type: ignore[union-attr]
    async with asyncio.timeout(60):
        while not lifecycle._waiting:
            await asyncio.sleep(0.005)
    refused = await site.refused(versions, bundle)
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED and refused.retry_after_s
    reads.go_on.set()
    assert len(await first) == len(await second) == 1  # the second finds it held


async def test_a_probe_finds_answers_that_are_not_those_of_the_bundle(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    right = make_bundle(tmp_path / "right", folder)
    versions = versions_of(right)
    await site.load(versions, right)
    for wrong_output in (7.0, float("nan")):
        with pytest.MonkeyPatch.context() as patch:
            answers = np.full((4, 32), wrong_output, "f4")
            patch.setattr(bundles_support, "compute", lambda *_, answers=answers: answers)
            wrong = make_bundle(tmp_path / f"{wrong_output}", folder)
        (result,) = await site.probe(versions, wrong)
        assert not result.ok
    await site.unload(versions)
    assert (await probe_refused(site, versions, right)).reason == "NOT_HELD"


async def test_a_probe_that_is_not_the_one_of_the_manifest_is_told_apart_from_a_wrong_expert(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    await site.load(versions_of(bundle), bundle)
    refused = await probe_refused(site, versions_of(bundle), rewritten(bundle, probe_changed))
    assert (refused.code.name, refused.reason) == ("DATA_LOSS", "BUNDLE_DIGEST")


async def probe_refused(site: Site, versions: Sequence[ExpertVersion], bundle: Bundle) -> MoesaicError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.probe(versions, bundle)
    return from_rpc_error(caught.value)


def probe_changed(content: bytearray) -> bytearray:
    """The first byte of the probe's inputs: tensors lie in the order of their names, and only `up` lies behind them."""
    first = len(content) - 4 * (24 * 32 + 2 * 4 * 32)
    content[first] ^= 1
    return content


async def test_clients_get_the_same_bits_while_experts_come_and_go(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    held, changing = sorted(await site.held()), True
    expected = [(await site.compute(version)).output for version in held]

    async def client() -> int:
        count = 0
        while changing:
            for version, output in zip(held, expected, strict=True):
                assert (await site.compute(version)).output == output
                count += 1
        return count

    clients = [asyncio.create_task(client()) for _ in range(4)]
    bundles = [make_bundle(tmp_path / str(seed), folder, [(0, 1), (1, 3)], seed=seed) for seed in range(3)]
    for turn in range(12):
        bundle = bundles[turn % 3]
        await site.load(versions_of(bundle), bundle)
        await site.unload(versions_of(bundle))
    changing = False
    assert min(await asyncio.gather(*clients)) > 0
    assert sorted(await site.held()) == held


async def test_memory_stays_flat_over_two_hundred_loads(tmp_path: Path) -> None:
    """Each load holds 6 MB, so that one in a hundred that stayed would show."""
    model = write_mixtral(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    bundle = make_bundle(tmp_path / "b", model, [(0, None), (1, None)])
    async with serving(model) as site:
        versions, process = versions_of(bundle), psutil.Process()
        resident = []
        for turn in range(200):
            await site.load(versions, bundle)
            await site.unload(versions)
            if turn in (20, 199):
                gc.collect()
                resident.append(process.memory_info().rss)
        assert resident[1] - resident[0] < 12 << 20


class FakeController(control_pb2_grpc.ControlServiceServicer):
    """Sends a bundle in pieces, as it is told to."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest_bytes
        self.weights = bundle.weights_file.read_bytes()
        # After so many bytes each stream breaks.
        self.break_after: int | None = None
        self.offsets: list[int] = []

    async def FetchBundle(
        self, request: control_pb2.FetchBundleRequest, context: Any
    ) -> AsyncIterator[control_pb2.FetchBundleResponse]:
        self.offsets.append(request.offset)
        yield control_pb2.FetchBundleResponse(manifest=self.manifest)
        end = len(self.weights) if self.break_after is None else request.offset + self.break_after
        for start in range(request.offset, min(end, len(self.weights)), 4096):
            yield control_pb2.FetchBundleResponse(weights=self.weights[start : min(start + 4096, end)])
        if end < len(self.weights):
            raise Unavailable("broken")


@asynccontextmanager
async def controlled(controller: FakeController) -> AsyncIterator[str]:
    server = rpc.Server(
        {rpc.CONTROL_SERVICE: lambda s: control_pb2_grpc.add_ControlServiceServicer_to_server(controller, s)}
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fetched_folders(temporary: Path) -> list[Path]:
    return [path.parent for path in temporary.glob(f"*/{WEIGHTS_FILE}")]


async def test_a_bundle_that_is_not_on_this_host_is_fetched_once_and_removed(
    temporary: Path, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    controller = FakeController(bundle)
    controller.break_after = 10_000
    async with controlled(controller) as address, serving(folder) as site:
        versions, elsewhere = versions_of(bundle), str(tmp_path / "elsewhere")
        await site.load(versions, bundle, folder=elsewhere, control_address=address)
        # The broken transfer went on where it ended.
        assert controller.offsets == list(range(0, len(controller.weights), 10_000))
        assert len(fetched_folders(temporary)) == 1
        request = expert_pb2.ProbeRequest(
            bundle=bundle.digest, experts=map(version_to_proto, versions), control_address=address
        )
        assert (await site.control.Probe(request)).results[0].ok
        assert len(controller.offsets) == -(-len(controller.weights) // 10_000)
    assert not fetched_folders(temporary)


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda c: setattr(c, "manifest", c.manifest + b" "), "DATA_LOSS", "BUNDLE_DIGEST"),
        (lambda c: setattr(c, "manifest", b""), "DATA_LOSS", "BUNDLE_DIGEST"),
        (lambda c: setattr(c, "weights", c.weights + bytes(9 << 20)), "DATA_LOSS", "DATA_LOSS"),
        (lambda c: setattr(c, "weights", c.weights[:-4]), "INVALID_ARGUMENT", "BUNDLE_WEIGHTS"),
        (lambda c: setattr(c, "break_after", 0), "UNAVAILABLE", "UNAVAILABLE"),
    ],
)
async def test_what_a_controller_sends_wrong_leaves_nothing(
    temporary: Path, folder: Path, tmp_path: Path, change: Any, code: str, reason: str
) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    controller = FakeController(bundle)
    change(controller)
    async with controlled(controller) as address, serving(folder) as site:
        site.server._control._bundles._retry_period_s = 0.01
        refused = await site.refused(versions_of(bundle), bundle, folder="", control_address=address)
        assert (refused.code.name, refused.reason, refused.field) == (code, reason, "bundle")
        assert not fetched_folders(temporary)


async def test_a_controller_that_falls_silent_is_given_up(
    temporary: Path, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    silent = asyncio.Event()

    class Silent(FakeController):
        async def FetchBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:
            yield control_pb2.FetchBundleResponse(manifest=self.manifest)
            await silent.wait()

    async with controlled(Silent(bundle)) as address:
        source = BundleSource(message_timeout_s=0.05, retry_period_s=0.0)
        with pytest.raises(DeadlineExceeded):
            async with source.open(bundle.digest, "", address):
                pass
        silent.set()
    assert not fetched_folders(temporary)


async def test_bytes_that_are_no_part_of_a_bundle_are_refused_as_lost(
    temporary: Path, folder: Path, tmp_path: Path
) -> None:
    async def fetch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"\xff"

    handlers = {"FetchBundle": grpc.unary_stream_rpc_method_handler(fetch)}
    handler = grpc.method_handlers_generic_handler(rpc.CONTROL_SERVICE, handlers)
    server = rpc.Server({rpc.CONTROL_SERVICE: lambda it: it.add_generic_rpc_handlers((handler,))})
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    with pytest.raises(DataLoss, match="no message of this call"):
        async with BundleSource().open(make_bundle(tmp_path / "b", folder).digest, "", address):
            pass
    await server.stop(0)
    assert not fetched_folders(temporary)


@pytest.mark.parametrize("address", ["unix:/tmp/socket", "dns:///", "somewhere", "a" * 5000])
async def test_a_controller_is_named_by_host_and_port_alone(
    address: str, site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    error = await site.refused(versions_of(bundle), bundle, folder="", control_address=address)
    assert isinstance(error, InvalidArgument) and error.field == "control_address"
    assert len(error.message) < 400


async def test_a_full_disk_is_a_clean_refusal(temporary: Path, folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", folder)
    async with controlled(FakeController(bundle)) as address:
        source = BundleSource(free_disk=lambda _: 100)
        with pytest.raises(FailedPrecondition) as caught:
            async with source.open(bundle.digest, "", address):
                pass
    assert caught.value.reason == "DISK_FULL"
    assert not fetched_folders(temporary)


async def test_a_folder_that_vanishes_while_it_is_read_is_an_error_with_a_name(
    site: Site, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, reads = make_bundle(tmp_path / "b", folder, [(0, None), (1, None)]), SlowReads(monkeypatch)
    refusal = asyncio.create_task(site.refused(versions_of(bundle), bundle))
    assert await asyncio.to_thread(reads.begun.wait, 60)
    (bundle.folder / WEIGHTS_FILE).unlink()
    reads.go_on.set()
    refused = await refusal
    assert (refused.code.name, refused.field) == ("FAILED_PRECONDITION", WEIGHTS_FILE)

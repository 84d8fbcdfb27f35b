"""What a canary costs: streams of which half are computed in another epoch, over all in one epoch, in turn.

One worker holds the versions of all epochs. The canary's epoch has other weights in one slot of some layers (swap; --slots: in more), or
one more slot in each of these layers with a gate row of its own (add). Steps then hold rows of two epochs: the layers that
differ have more groups of fewer rows, and gates with a further product.

Run: python benchmarks/canary.py [--streams 16] [--layers 4] [--rounds 7]
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from harness import options
from harness.load import Prompt, decode, random_prompts
from harness.result import Table, conclude, ratio_figure
from harness.serving import Setup, serve
from harness.turns import Side, take_turns

from moesaic import rpc
from moesaic.bundles import Bundle, BundleExpert, BundleGateRow, Manifest, TensorSource, write_bundle
from moesaic.bundles.version import mlp_parameters
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, ExpertVersion, GateRow, versions_to_proto
from moesaic.families import MoeModel, describe_model
from moesaic.routing_table import Canary, Replica, RoutingTable, Snapshot
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

SHARE = 0.5
PROMPT_TOKENS = 8
STEPS = 120
TAKEN_TIMEOUT_S = 30.0
# Layer and slot; None: a new slot.
_Target = tuple[int, int | None]


class Controller(control_pb2_grpc.ControlServiceServicer):
    """Publishes one snapshot after the other to one router, and knows which epochs that uses."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._snapshots: asyncio.Queue[Snapshot] = asyncio.Queue()
        self._used: tuple[str, str] = ("", "")
        self._reported = threading.Condition()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[control_pb2.WatchResponse]:
        while True:
            yield (await self._snapshots.get()).to_proto()

    async def ReportEpochs(
        self, request: control_pb2.ReportEpochsRequest, context: Any
    ) -> control_pb2.ReportEpochsResponse:
        with self._reported:
            self._used = request.epoch, request.canary
            self._reported.notify_all()
        return control_pb2.ReportEpochsResponse()

    def publish(self, snapshot: Snapshot) -> None:
        self._loop.call_soon_threadsafe(self._snapshots.put_nowait, snapshot)

    def wait_used(self, epoch: str, canary: str) -> None:
        """Returns when the router says so. SystemExit if it does not."""
        with self._reported:
            if not self._reported.wait_for(lambda: self._used == (epoch, canary), TAKEN_TIMEOUT_S):
                raise SystemExit("the router did not take the epoch")

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serves on a thread of its own; gives HOST:PORT."""
        thread = threading.Thread(target=self._loop.run_forever, name="controller")
        thread.start()
        try:
            yield self._run(self._start())
        finally:
            self._run(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    async def _start(self) -> str:
        # gRPC's server belongs to the loop on which it is made.
        self._server = rpc.Server(
            {
                rpc.CONTROL_SERVICE: lambda added: control_pb2_grpc.add_ControlServiceServicer_to_server(
                    self, added
                )
            }
        )
        return f"127.0.0.1:{await self._server.start('127.0.0.1', 0)}"

    async def _stop(self) -> str:
        await self._server.stop(0)
        return ""

    def _run(self, call: Coroutine[Any, Any, str]) -> str:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(TAKEN_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Spell:
    """A spell of decoding, and the CPU seconds of worker and router for each of its tokens, prompts included. Others on the
    machine change these less than the speed."""

    tokens_per_s: float
    cpu_s_per_token: float


@dataclass(frozen=True, slots=True)
class Site:
    """A router that follows the controller, and the snapshot of each side."""

    router: str
    pids: tuple[int, ...]
    controller: Controller
    snapshots: dict[str, Snapshot]

    def measure(self, side: str, prompts: list[Prompt], steps: int) -> Spell:
        snapshot = self.snapshots[side]
        assert snapshot.epoch is not None
        self.controller.publish(snapshot)
        canary = "" if snapshot.canary is None else snapshot.canary.epoch.id
        self.controller.wait_used(snapshot.epoch.id, canary)
        before_s = self._cpu_s()
        decoded = decode(self.router, prompts, steps)
        return Spell(decoded.tokens_per_s, (self._cpu_s() - before_s) / sum(map(len, decoded.token_ids)))

    def _cpu_s(self) -> float:
        times = (psutil.Process(pid).cpu_times() for pid in self.pids)
        return sum(time.user + time.system for time in times)


def main(
    streams: Annotated[int, typer.Option(min=2, help="Open streams.")] = 16,
    layers: Annotated[int, typer.Option(min=1, help="Layers in which the epochs differ.")] = 4,
    slots: Annotated[int, typer.Option(min=1, help="Slots that a swap changes in each of them.")] = 1,
    rounds: options.Rounds = 7,
    model: options.Model = options.DEMO_MODEL,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes canary.json."""
    assert model is not None
    shape = describe_model(open_checkpoint(model))
    gated = [layer for layer, experts in sorted(shape.experts.items()) if experts.gate is not None][:layers]
    prompts = random_prompts(streams, PROMPT_TOKENS, shape.vocab_size, seed=streams)
    targets: dict[str, list[_Target]] = {
        "swap": [(layer, slot) for layer in gated for slot in range(slots)],
        "add": [(layer, None) for layer in gated],
    }
    with _site(model, shape, targets) as site:
        sides = [
            Side(name, partial(site.measure, name, prompts, 6 if quick else STEPS)) for name in site.snapshots
        ]
        turns = take_turns(sides, options.rules(rounds, quick), f"{streams} streams")
    figures = [
        ratio_figure(
            f"canary-{name}",
            f"{name} of {len(gated)} layers over one epoch, {streams} streams",
            turns,
            name,
            "one epoch",
            _speed,
        )
        for name in ("swap", "add")
    ]
    figures += [
        ratio_figure(
            f"canary-cpu-{name}", f"CPU time a token, {name} over one epoch", turns, name, "one epoch", _cpu
        )
        for name in ("swap", "add")
    ]
    rows = tuple(
        (
            side.name,
            f"{turns.median(side.name, _speed):.1f}",
            f"{1000 * turns.median(side.name, _cpu):.2f}",
        )
        for side in sides
    )
    conclude(
        "canary",
        out,
        figures=figures,
        tables=[Table("", ("side", "tokens/s", "CPU ms a token"), rows)],
        notes=[f"decode, {SHARE:.0%} of the streams in the canary's epoch, one worker, one router"],
        quick=quick,
    )


@contextmanager
def _site(model: Path, shape: MoeModel, targets: Mapping[str, Sequence[_Target]]) -> Iterator[Site]:
    controller = Controller()
    num_slots = max(shape.num_slots.values())
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Setup(model, routers=0), num_slots) as site,
        controller.serving() as address,
    ):
        (worker,) = site.workers
        base = _describe(worker)
        epoch = Epoch.of(model.name, dict(base.holdings))
        canaries = {}
        for name, experts in targets.items():
            bundle = _bundle(Path(folder, name), model, shape, experts)
            canaries[name] = _changed(epoch, bundle, shape)
            _load(worker, bundle, canaries[name])
        table = RoutingTable(1, (_describe(worker),))
        snapshots = {"one epoch": Snapshot(epoch, table)}
        snapshots |= {name: Snapshot(epoch, table, Canary(one, SHARE)) for name, one in canaries.items()}
        controller.publish(snapshots["one epoch"])
        setup = Setup(model, shared_workers=site.workers, controller=address)
        with serve(setup, num_slots) as routers:
            yield Site(routers.router, (*site.pids, *routers.pids), controller, snapshots)


def _bundle(folder: Path, base: Path, shape: MoeModel, targets: Sequence[_Target]) -> Bundle:
    """Random experts, as large as those of the model."""
    random = np.random.default_rng(len(targets))
    tensors: dict[str, TensorSource] = {}
    experts = []
    for layer, slot in targets:
        module, prefix = shape.experts[layer].module, f"{layer}.{slot}."
        for name in module.weights:
            size = module.shape(name)
            values = (random.standard_normal(size) / np.sqrt(size[-1])).astype(np.float32)
            tensors[prefix + name] = TensorSource.of(values)
        row = None
        if slot is None:
            row = BundleGateRow(prefix + "row")
            values = random.standard_normal(shape.hidden_size) / np.sqrt(shape.hidden_size)
            tensors[prefix + "row"] = TensorSource.of(values.astype(np.float32))
        weights = {name: prefix + name for name in module.weights}
        experts.append(BundleExpert(layer, slot, "mlp", mlp_parameters(module), "", weights, row))
    manifest = Manifest(
        name=folder.name,
        base_model=base.name,
        base_fingerprint=FolderIdentity.of(open_checkpoint(base)).fingerprint.hex(),
        hidden_size=shape.hidden_size,
        experts=tuple(experts),
        tensors={},
    )
    return write_bundle(folder, manifest, tensors)


def _changed(epoch: Epoch, bundle: Bundle, shape: MoeModel) -> Epoch:
    """The epoch with a bundle's experts."""
    versions, rows, addresses = dict(epoch.versions), {}, []
    for expert in bundle.manifest.experts:
        slot = shape.experts[expert.layer].num_slots if expert.slot is None else expert.slot
        address = ExpertAddress(expert.layer, slot)
        versions[address] = bytes.fromhex(expert.version)
        addresses.append(address)
        if expert.gate_row is not None:
            rows[address] = GateRow(bundle.read(expert.gate_row.tensor))
    name = bundle.manifest.name
    bundles = [EpochBundle(name, bundle.digest, (), tuple(addresses))]
    return Epoch.of(epoch.model, versions, gate_rows=rows, bundles=bundles)


def _load(worker: str, bundle: Bundle, epoch: Epoch) -> None:
    (of_bundle,) = epoch.bundles
    versions = [ExpertVersion(address, epoch.versions[address]) for address in of_bundle.experts]
    request = expert_pb2.LoadRequest(
        bundle=bundle.digest, experts=versions_to_proto(versions), folder=str(bundle.folder)
    )
    with rpc.channel(worker) as channel:
        for _ in expert_pb2_grpc.WorkerControlServiceStub(channel).Load(request):
            pass


def _describe(worker: str) -> Replica:
    with rpc.channel(worker) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        return Replica.from_description(worker, stub.Describe(expert_pb2.DescribeRequest()))


def _speed(spell: Spell) -> float:
    return spell.tokens_per_s


def _cpu(spell: Spell) -> float:
    return spell.cpu_s_per_token


if __name__ == "__main__":
    typer.run(main)

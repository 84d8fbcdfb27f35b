"""How long callers wait for one layer of a worker while it loads and gives up experts, against an undisturbed worker.

One process is a worker, another calls it in a loop, layer by layer, with a few rows for every expert. On the one side
nothing else happens; on the other a bundle with an expert for each of some layers is loaded and unloaded again and
again. Both sides take turns.

Run: python benchmarks/load_stall.py [--rounds 5] [--layers 4] [--model FOLDER]
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import numpy as np
import typer
from harness import options
from harness.result import Figure, Table, conclude
from harness.turns import Side, take_turns

from moesaic import rpc
from moesaic.bundles import Bundle, BundleExpert, Manifest, TensorSource, write_bundle
from moesaic.bundles.version import mlp_parameters
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress, ExpertVersion, version_to_proto, versions_from_proto
from moesaic.families import MoeModel, describe_model
from moesaic.v1 import common_pb2, expert_pb2, expert_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
START_S = 300.0
CALL_S = 30.0
ROWS = 8
QUIET, LOADING = "undisturbed", "while experts are loaded"


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds that calls took, and how many loads ended meanwhile, with the seconds of each."""

    calls: tuple[float, ...]
    loads: tuple[float, ...] = ()

    def quantile(self, q: float) -> float:
        return quantiles(self.calls, n=1000)[round(q * 1000) - 1]


def main(
    rounds: options.Rounds = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long each side measures in a round.")] = 8.0,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the bundle, one expert each.")] = 4,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes load_stall.json."""
    folder = options.DEMO_MODEL if model is None else model
    described = describe_model(open_checkpoint(folder))
    with tempfile.TemporaryDirectory() as temporary, worker(folder) as address:
        bundle = random_bundle(Path(temporary, "bundle"), described, layers)
        bundle_mib = bundle.num_bytes / 2**20
        channel = rpc.channel(address)
        calls = Calls(channel, described)
        lasting = 0.5 if quick else seconds
        turns = take_turns(
            (
                Side(QUIET, partial(calls.measure, lasting)),
                Side(LOADING, partial(measure_loading, calls, channel, bundle, lasting)),
            ),
            options.rules(rounds, quick),
            "load stall",
        )
        calls.close()
        channel.close()
    ratio = turns.ratio(LOADING, QUIET, lambda waits: waits.quantile(0.99))
    extra = [
        1000 * (round_[LOADING].quantile(0.99) - round_[QUIET].quantile(0.99)) for round_ in turns.rounds
    ]
    loads = sorted(load for round_ in turns.rounds for load in round_[LOADING].loads)
    conclude(
        "load_stall",
        out,
        figures=[
            Figure(
                "load-stall-p99",
                f"p99 of a call while a bundle of {layers} layers is loaded and unloaded, over undisturbed",
                ratio.value,
                "x",
                ratio.low,
                ratio.high,
                sum(turns.disturbed),
            ),
            Figure("load-stall-extra", "what this adds to the p99", sorted(extra)[len(extra) // 2], "ms"),
        ],
        tables=[
            Table(
                "",
                ("calls", "p50 ms", "p99 ms", "p99.9 ms", "longest ms", "number"),
                tuple(_row(name, [round_[name] for round_ in turns.rounds]) for name in (QUIET, LOADING)),
            )
        ],
        notes=[f"{len(loads)} loads of {bundle_mib:.1f} MiB, median {1000 * loads[len(loads) // 2]:.0f} ms"],
        quick=quick,
    )


def _row(name: str, rounds: Sequence[Waits]) -> tuple[str, ...]:
    waits = Waits(tuple(call for of_round in rounds for call in of_round.calls))
    values = (waits.quantile(0.5), waits.quantile(0.99), waits.quantile(0.999), max(waits.calls))
    return (name, *(f"{1000 * value:.2f}" for value in values), str(len(waits.calls)))


@contextmanager
def worker(model: Path) -> Iterator[str]:
    """The address of a worker with all experts, in a process of its own."""
    command = [sys.executable, "-m", "expert_worker", "--model", str(model)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        ready = re.fullmatch(r"ready grpc=(\S+)\n", process.stdout.readline())
        if ready is None:
            raise SystemExit("the worker did not start")
        yield ready[1]
    finally:
        process.terminate()
        process.wait(START_S)


class Calls:
    """A stream of calls to a worker, one after another, over all layers in turn."""

    def __init__(self, channel: object, model: MoeModel) -> None:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        held = sorted(
            versions_from_proto(stub.Describe(expert_pb2.DescribeRequest(), timeout=CALL_S).experts)
        )
        rows = np.random.default_rng(0).standard_normal((ROWS, model.hidden_size)).astype("<f4")
        hidden = common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
        self._requests = [
            expert_pb2.ComputeRequest(
                epoch="e",
                layer=layer,
                hidden=hidden,
                experts=[
                    expert_pb2.ExpertRows(
                        slot=version.address.slot, version=version.digest, rows=range(ROWS // 2)
                    )
                    for version in held
                    if version.address.layer == layer
                ],
                combine=expert_pb2.COMBINE_ROWS,
                timeout_ms=int(1000 * CALL_S),
            )
            for layer in sorted({version.address.layer for version in held})
        ]
        self._sent: queue.SimpleQueue[expert_pb2.ComputeRequest | None] = queue.SimpleQueue()
        self._answers = stub.Compute(iter(self._sent.get, None))

    def measure(self, seconds: float) -> Waits:
        waits = []
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            for request in self._requests:
                start_s = time.perf_counter()
                self._sent.put(request)
                answer = next(self._answers)
                waits.append(time.perf_counter() - start_s)
                if answer.HasField("error"):
                    raise SystemExit(f"a call failed: {answer.error.message}")
        return Waits(tuple(waits))

    def close(self) -> None:
        self._sent.put(None)


def measure_loading(calls: Calls, channel: object, bundle: Bundle, seconds: float) -> Waits:
    """The waits while another thread loads and unloads."""
    stub, done, loads = expert_pb2_grpc.WorkerControlServiceStub(channel), threading.Event(), list[float]()
    versions = [
        version_to_proto(ExpertVersion(ExpertAddress(one.layer, 1 << 16), bytes.fromhex(one.version)))
        for one in bundle.manifest.experts
    ]

    def change() -> None:
        while not done.is_set():
            start_s = time.perf_counter()
            request = expert_pb2.LoadRequest(
                bundle=bundle.digest, experts=versions, folder=str(bundle.folder)
            )
            list(stub.Load(request, timeout=CALL_S))
            loads.append(time.perf_counter() - start_s)
            stub.Unload(expert_pb2.UnloadRequest(experts=versions), timeout=CALL_S)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        waits = calls.measure(seconds)
    finally:
        done.set()
        thread.join()
    return Waits(waits.calls, tuple(loads))


def random_bundle(folder: Path, model: MoeModel, num_layers: int) -> Bundle:
    """A new expert with random weights for each of the first layers."""
    random, tensors, experts = np.random.default_rng(1), dict[str, TensorSource](), []
    for layer in sorted(model.experts)[:num_layers]:
        module = model.experts[layer].module
        names = {weight: f"{layer}.{weight}" for weight in module.weights}
        for weight, name in names.items():
            shape = module.shape(weight)
            tensors[name] = TensorSource.of(
                random.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
            )
        experts.append(BundleExpert(layer, None, "mlp", mlp_parameters(module), "", names))
    draft = Manifest("random", "", "0" * 64, model.hidden_size, tuple(experts), {})
    return write_bundle(folder, draft, tensors)


if __name__ == "__main__":
    typer.run(main)

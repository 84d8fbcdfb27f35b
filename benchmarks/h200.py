"""Mixtral 8x7B on one GPU: decode and prefill, against `transformers` and against what the memory allows.

The weights are random and are made on the device. Ours is a router and one worker, processes started by hand,
on the same GPU, over gRPC and over shared memory. Theirs is a process of its own with its fastest experts,
its fastest cache and, unless `--no-compile`, its compiled `generate`. A GPU holds one copy of the experts, so
ours ends before theirs begins; gRPC and shared memory take turns. Both sides compute with the very same
weights, so their tokens may be compared. No expert is ever written: the checkpoint's files have holes
(harness/sparse_checkpoint.py).

The floor of a decode step is the bytes that it reads under uniform routing (harness/floors.py) over the
device's bytes a second, measured in the same run by a large copy and a large sum. The floor of a prompt is
that, or its products over the measured rate, whichever is longer.

Run: PYTHONPATH=. python benchmarks/h200.py [--batches 1,16,64] [--prefill 2048] [--no-compile]
Rehearse without a GPU: python benchmarks/h200.py --device cpu --quick
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from harness import options
from harness.floors import decode_bytes, prefill_floor_s, token_cache_bytes
from harness.likeness import same_tokens
from harness.load import Decoded, FirstToken, Prompt, decode, first_token, random_prompts
from harness.phases import layer_table, phase_table
from harness.result import Figure, Table, conclude
from harness.serving import Served, Setup, serve
from harness.sparse_checkpoint import write_sparse_checkpoint
from harness.transformers_peer import Peer, running_peer
from harness.turns import Side, Turns, progress, take_turns
from random_checkpoint import Shape

from cluster.bench.transformers_peer import PlainBatch

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
# The programs that this one starts find the product and the benchmarks' own modules by this path.
MODULES = {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
GRPC, SHARED = "gRPC", "shared memory"
PROMPT_TOKENS = 32
STEPS = 48
# The cache positions of every stream: its prompt, and what it writes while the others begin and are measured.
CACHE_TOKENS = 512
PROBE_TIMEOUT_S = 300.0
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Run:
    """What the options ask for."""

    shape: Shape
    device: str
    batches: tuple[int, ...]
    prefill: int
    steps: int
    rounds: int
    quick: bool
    compiles: bool
    combine: str

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def prompts(self, batch: int) -> list[Prompt]:
        return random_prompts(batch, PROMPT_TOKENS, self.shape.vocabulary, seed=batch)


@dataclass(frozen=True, slots=True)
class Probe:
    """The rates of the device."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    passes: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Ours:
    """Both transports in turn: decoding by batch size, and the prompt."""

    decode: Mapping[int, Turns[Decoded]]
    prefill: Turns[FirstToken]


@dataclass(frozen=True, slots=True)
class Theirs:
    """The best way of `transformers` for every shape, and what it answered."""

    choices: Mapping[str, str]
    decode: Mapping[int, Sequence[PlainBatch]]
    prefill_s: Sequence[float]

    def step_s(self, batch: int) -> float:
        return statistics.median(
            batch / (each.summary.decode_tokens_per_s or math.nan) for each in self.decode[batch]
        )


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,16,64",
    prefill: Annotated[int, typer.Option(min=2, help="Length of the long prompt.")] = 2048,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the model has.")] = None,
    compiles: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Whether transformers may compile: minutes a batch."),
    ] = True,
    combine: Annotated[
        str, typer.Option(help="engine.combine: rows, or sum for fewer bytes on the way back.")
    ] = "rows",
    rounds: options.Rounds = 5,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes h200.json."""
    os.environ |= MODULES
    run = Run(
        shape=_shape(layers, quick),
        device=device,
        batches=tuple(map(int, batches.split(","))),
        prefill=min(prefill, 64) if quick else prefill,
        steps=6 if quick else STEPS,
        rounds=min(rounds, 2) if quick else rounds,
        quick=quick,
        compiles=compiles and device == "cuda",
        combine=combine,
    )
    probe = _probe(run)
    progress(f"{probe.name}: {probe.bytes_per_s / 1e9:,.0f} GB/s, {probe.flops_per_s / 1e12:,.1f} TFLOP/s")
    with _checkpoint(run.shape) as folder:
        ours = _measure_ours(run, folder)
        theirs = _measure_theirs(run, folder)
    phases = tuple(ours.decode[run.batches[0]].rounds[0][GRPC].phases.seconds)
    conclude(
        "h200",
        out,
        figures=[*_decode_figures(run, ours, theirs), *_prefill_figures(ours, theirs)],
        tables=[
            _decode_table(run, probe, ours, theirs),
            _prefill_table(run, probe, ours, theirs),
            layer_table(
                ours.decode,
                (GRPC, SHARED),
                run.shape.layers,
                title="µs a layer while decoding",
                per_s=1e6,
                digits=0,
            ),
            *(phase_table(turns, batch, (GRPC, SHARED), phases) for batch, turns in ours.decode.items()),
            _pass_table(run, probe),
        ],
        notes=_notes(run, probe),
        data={
            "probe": {"bytes_per_s": probe.bytes_per_s, "flops_per_s": probe.flops_per_s},
            "passes": list(probe.passes),
            "choices": dict(theirs.choices),
            "shape": run.shape.config,
        },
        quick=quick,
    )


def mixtral(layers: int) -> Shape:
    """Mixtral 8x7B, with a context that the long prompt fits into."""
    return Shape(hidden=4096, inner=14336, layers=layers, heads=32, kv_heads=8, context=4096)


def _shape(layers: int | None, quick: bool) -> Shape:
    return options.SMALL if quick else mixtral(layers or 32)


def _probe(run: Run) -> Probe:
    """Measures in a process of its own, whose memory is free again when it ends."""
    shape = run.shape
    sizes = map(str, (shape.hidden, shape.inner, shape.experts, shape.experts_per_token))
    done = subprocess.run(
        [sys.executable, str(PEERS / "device_probe.py"), run.device, *sizes],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PROBE_TIMEOUT_S,
    )
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _checkpoint(shape: Shape) -> Iterator[Path]:
    """A sparse checkpoint; 3 GB of a full-sized model are really written."""
    folder = Path(tempfile.mkdtemp(prefix="bench_sparse_"))
    try:
        progress(f"writing the dense weights to {folder}")
        yield write_sparse_checkpoint(folder / "model", shape)
    finally:
        shutil.rmtree(folder)


def _setup(run: Run, folder: Path) -> Setup:
    """How our processes are started, with bounds that suit the GPU."""
    shape = run.shape
    cache_tokens = max(max(run.batches) * CACHE_TOKENS, 2 * shape.context)
    settings = {
        "device": run.device,
        "dtype": run.dtype,
        "engine.combine": run.combine,
        "engine.max_batch_tokens": str(max(512, run.prefill)),
        "engine.max_running_sequences": str(max(64, *run.batches)),
        "engine.kv_cache_mib": str(1 + (cache_tokens * token_cache_bytes(shape, run.item_bytes) >> 20)),
    }
    return Setup(folder, settings=settings, worker_module="peers.random_worker")


def _measure_ours(run: Run, folder: Path) -> Ours:
    fresh = _fresh_prompts(run)
    with ExitStack() as stack:
        progress("ours: making the experts on the device")
        setup = _setup(run, folder)
        without_lane = replace(setup, settings={**setup.settings, "engine.shared_memory": "off"})
        first = stack.enter_context(serve(without_lane, run.shape.experts))
        second = stack.enter_context(serve(replace(setup, shared_workers=first.workers), run.shape.experts))
        sites = {GRPC: first, SHARED: second}
        rules = options.rules(run.rounds, run.quick)

        def turns(measure: Callable[[Served], Any], label: str) -> Turns[Any]:
            for site in sites.values():
                measure(site)
            # The worker is busy in every turn; only the other router must be idle.
            sides = [
                Side(name, partial(measure, site), (site.processes["router"],))
                for name, site in sites.items()
            ]
            return take_turns(sides, rules, f"ours, {label}")

        by_batch = {
            batch: turns(lambda site, batch=batch: _decode(run, site, batch), f"batch {batch}")
            for batch in run.batches
        }
        prefill = turns(lambda site: first_token(site.router, next(fresh)), f"prompt of {run.prefill}")
    return Ours(by_batch, prefill)


def _decode(run: Run, site: Served, batch: int) -> Decoded:
    return decode(site.router, run.prompts(batch), run.steps)


def _fresh_prompts(run: Run) -> Iterator[Prompt]:
    """Prompts that are all different, so that no prefix is in a cache."""
    for seed in count(1000):
        yield from random_prompts(1, run.prefill, run.shape.vocabulary, seed=seed)


def _measure_theirs(run: Run, folder: Path) -> Theirs:
    side, how = str(PEERS / "device_side.py"), "compile" if run.compiles else "plain"
    fresh = _fresh_prompts(run)
    choices: dict[str, str] = {}
    by_batch: dict[int, list[PlainBatch]] = {}
    progress("transformers: making the model on the device")
    with running_peer((sys.executable, side, str(folder), run.device, run.dtype, how)) as peer:
        for batch in run.batches:
            choices[str(batch)] = _choose(peer, run.prompts(batch), run.steps)
            by_batch[batch] = [peer.decode(run.prompts(batch), run.steps) for _ in range(run.rounds)]
        choices["prefill"] = _choose(peer, [next(fresh)], 0)
        prefill_s = [peer.decode([next(fresh)], 0).summary.prefill_s for _ in range(run.rounds)]
    return Theirs(choices, by_batch, prefill_s)


def _choose(peer: Peer, prompts: Sequence[Prompt], steps: int) -> str:
    """Lets transformers try its ways; the fastest to decode or, without steps, to read the prompts."""
    found = peer.decode(prompts, steps)
    chosen, trials_s = (
        (found.decoding, found.decoding_trials_s) if steps else (found.reading, found.reading_trials_s)
    )
    tried = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in trials_s.items())
    progress(f"transformers, batch {len(prompts)}: {chosen} of {tried}")
    return chosen


def _step_s(turns: Turns[Decoded], name: str, batch: int) -> float:
    return turns.median(name, lambda decoded: batch / decoded.tokens_per_s)


def _decode_floor_s(run: Run, probe: Probe, batch: int) -> float:
    context = PROMPT_TOKENS + run.steps
    return decode_bytes(run.shape, batch, context, run.item_bytes) / probe.bytes_per_s


def _decode_figures(run: Run, ours: Ours, theirs: Theirs) -> Iterator[Figure]:
    for batch in run.batches:
        for name in (GRPC, SHARED):
            seconds = [batch / speed for speed in ours.decode[batch].values(name, lambda d: d.tokens_per_s)]
            key, title = (
                f"h200-decode-{name.lower()}-b{batch}",
                f"decode over transformers, {name}, batch {batch}",
            )
            yield _figure(key, title, theirs.step_s(batch), seconds, ours.decode[batch])


def _prefill_figures(ours: Ours, theirs: Theirs) -> Iterator[Figure]:
    theirs_s = statistics.median(theirs.prefill_s)
    for name in (GRPC, SHARED):
        seconds = ours.prefill.values(name, lambda first: first.seconds)
        key, title = f"h200-prefill-{name.lower()}", f"prefill over transformers, {name}"
        yield _figure(key, title, theirs_s, seconds, ours.prefill)


def _figure(key: str, title: str, theirs_s: float, ours_s: Sequence[float], turns: Turns[Any]) -> Figure:
    """Their median over each of our rounds."""
    ratios = [theirs_s / seconds for seconds in ours_s]
    return Figure(key, title, statistics.median(ratios), "x", min(ratios), max(ratios), sum(turns.disturbed))


def _decode_table(run: Run, probe: Probe, ours: Ours, theirs: Theirs) -> Table:
    def row(batch: int) -> tuple[str, ...]:
        turns = ours.decode[batch]
        floor_s, theirs_s = _decode_floor_s(run, probe, batch), theirs.step_s(batch)
        steps_s = [_step_s(turns, name, batch) for name in (GRPC, SHARED)]
        best_s = min(steps_s)
        return (
            str(batch),
            f"{1000 * floor_s:.2f}",
            *(f"{1000 * step_s:.2f}" for step_s in steps_s),
            f"{1000 * theirs_s:.2f}",
            theirs.choices[str(batch)],
            f"{batch / best_s:,.0f}",
            f"{batch / theirs_s:,.0f}",
            f"{floor_s / best_s:.0%}",
            f"{floor_s / theirs_s:.0%}",
            f"{same_tokens(turns.rounds[0][GRPC].token_ids, theirs.decode[batch][0].token_ids):.0%}",
        )

    return Table(
        "Decode, ms a step",
        (
            *("batch", "floor", "gRPC", "shared memory", "transformers", "with"),
            *("ours tokens/s", "theirs tokens/s", "ours of the floor", "theirs of the floor", "same tokens"),
        ),
        tuple(map(row, run.batches)),
    )


def _prefill_table(run: Run, probe: Probe, ours: Ours, theirs: Theirs) -> Table:
    floor_s = prefill_floor_s(
        run.shape,
        run.prefill,
        run.item_bytes,
        bytes_per_s=probe.bytes_per_s,
        flops_per_s=probe.flops_per_s,
    )
    ours_s = [ours.prefill.median(name, lambda first: first.seconds) for name in (GRPC, SHARED)]
    theirs_s = statistics.median(theirs.prefill_s)
    return Table(
        "Time to the first token, ms",
        (
            "prompt",
            "floor",
            "gRPC",
            "shared memory",
            "transformers",
            "with",
            "ours tokens/s",
            "theirs tokens/s",
        ),
        (
            (
                str(run.prefill),
                *(f"{1000 * seconds:.1f}" for seconds in (floor_s, *ours_s, theirs_s)),
                theirs.choices["prefill"],
                *(f"{run.prefill / seconds:,.0f}" for seconds in (min(ours_s), theirs_s)),
            ),
        ),
    )


def _pass_table(run: Run, probe: Probe) -> Table:
    """The worker's own kernels on one layer, without any process around them."""
    expert_bytes = 3 * run.shape.hidden * run.shape.inner * run.item_bytes

    def row(measured: Mapping[str, Any]) -> tuple[str, ...]:
        grouped_s = measured["grouped_s"]
        return (
            str(measured["tokens"]),
            str(measured["experts"]),
            f"{1e6 * measured['experts'] * expert_bytes / probe.bytes_per_s:.0f}",
            f"{1e6 * measured['apart_s']:.0f}",
            "" if grouped_s is None else f"{1e6 * grouped_s:.0f}",
        )

    return Table(
        "Experts of one layer, µs a pass",
        ("tokens", "distinct experts", "byte floor", "one after another", "grouped"),
        tuple(map(row, probe.passes)),
    )


def _notes(run: Run, probe: Probe) -> list[str]:
    shape = run.shape
    return [
        f"{probe.name}: {probe.bytes_per_s / 1e9:,.0f} GB/s (the better of a copy and a sum), "
        f"{probe.flops_per_s / 1e12:,.1f} TFLOP/s ({run.dtype} product), both measured in this run",
        f"hidden {shape.hidden}, inner {shape.inner}, {shape.layers} layers, {shape.experts} experts top-"
        f"{shape.experts_per_token}, {shape.heads}/{shape.kv_heads} heads, vocabulary {shape.vocabulary}, "
        f"{run.dtype}, combine: {run.combine}; "
        f"prompts of {PROMPT_TOKENS} tokens, random weights, the same on both sides",
        "on a GPU a phase is the host's time in it: the host waits for kernels that were launched earlier where "
        "it next synchronises, which for attention, gate and the dense products is `encode`",
        "`same tokens`: greedy tokens equal to those of transformers; in bfloat16 a random model has near "
        "ties, and after one that is decided otherwise the rest differs",
    ]


if __name__ == "__main__":
    typer.run(main)

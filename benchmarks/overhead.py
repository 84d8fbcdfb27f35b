"""The overhead between router and worker, layer by layer; and the router's own time over its byte floor.

The overhead per layer is (the router's wait for a layer - the time the slowest worker computed) / layers,
taken from the router's own account while streams decode. It holds the transport, the worker's decoding,
queueing and encoding, and the switches between processes. The time that the router spends on encoding and
decoding is not waiting; it is shown beside it. Measured over gRPC (the direct stream, as routers use it
between hosts), over gRPC by the threads of grpcio alone, and over shared memory.

The router's own time is a step's time in which it does not wait. Its floor is the bytes of router weights
that a step of one token reads (fp32), over the memory bandwidth measured with the same threads in the same
round.

Run: python benchmarks/overhead.py [--batches 1,4,16] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import psutil
import typer
from harness import options
from harness.bandwidth import measure_bandwidth
from harness.floors import router_parameters
from harness.load import Decoded, Prompt, decode, random_prompts
from harness.phases import Phases, layer_table, phase_table
from harness.result import Figure, conclude, median_figure
from harness.serving import Setup, serve
from harness.turns import Side, Turns, take_turns

STEPS = {1: 48, 4: 24, 16: 16}
TRANSPORTS = {
    "gRPC, grpcio": {"engine.direct_stream": "off", "engine.shared_memory": "off"},
    "gRPC": {"engine.direct_stream": "auto", "engine.shared_memory": "off"},
    "shared memory": {"engine.direct_stream": "off", "engine.shared_memory": "auto"},
}
JUDGED = {"gRPC": "overhead-grpc", "shared memory": "overhead-shared-memory"}


@dataclass(frozen=True, slots=True)
class Spell:
    """A spell of decoding; with one stream also the memory's bytes per second, measured right after it."""

    decoded: Decoded
    bandwidth: float

    @property
    def phases(self) -> Phases:
        return self.decoded.phases


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes overhead.json."""
    folder = options.checkpoint(model, quick)
    shape = options.read_shape(folder)
    floor_bytes = 4 * router_parameters(shape)
    threads = len(psutil.Process().cpu_affinity())
    with ExitStack() as stack:
        sites = {
            name: stack.enter_context(serve(Setup(folder, settings=settings)))
            for name, settings in TRANSPORTS.items()
        }
        by_batch: dict[int, Turns[Spell]] = {}
        for batch in map(int, batches.split(",")):
            prompts = random_prompts(batch, 32, shape.vocabulary, seed=batch)
            steps = 6 if quick else STEPS.get(batch, 16)
            by_batch[batch] = take_turns(
                (
                    Side(name, partial(_spell, site.router, prompts, steps, threads), site.pids)
                    for name, site in sites.items()
                ),
                options.rules(rounds, quick),
                f"overhead, batch {batch}",
            )
    figures = [
        *(_overhead(by_batch[batch], name, batch, shape.layers) for batch in by_batch for name in sites),
        *([_floor(by_batch[1], floor_bytes)] if 1 in by_batch else []),
    ]
    phases = tuple(by_batch[max(by_batch)].rounds[0]["gRPC"].phases.seconds)
    title = "ms a layer while decoding, one worker"
    conclude(
        "overhead",
        out,
        figures=figures,
        tables=[
            layer_table(by_batch, tuple(TRANSPORTS), shape.layers, title=title, per_s=1e3, digits=2),
            *(phase_table(turns, batch, TRANSPORTS, phases) for batch, turns in by_batch.items()),
        ],
        notes=[f"the router reads {floor_bytes / 1e6:,.0f} MB of its own weights in a step of one token"],
        quick=quick,
    )


def _spell(router: str, prompts: Sequence[Prompt], steps: int, threads: int) -> Spell:
    decoded = decode(router, prompts, steps)
    return Spell(decoded, measure_bandwidth(threads) if len(prompts) == 1 else 0.0)


def _overhead(turns: Turns[Spell], transport: str, batch: int, layers: int) -> Figure:
    key = JUDGED.get(transport, "")
    return median_figure(
        f"{key}-b{batch}" if key and batch > 1 else key,
        f"overhead per layer, {transport}, batch {batch}",
        turns,
        transport,
        lambda spell: 1000 * spell.phases.overhead_s / layers,
        "ms",
    )


def _floor(turns: Turns[Spell], floor_bytes: int) -> Figure:
    return median_figure(
        "router-floor",
        "router time of a step of one token over its byte floor",
        turns,
        "gRPC",
        lambda spell: spell.phases.router_s / (floor_bytes / spell.bandwidth),
        "x",
    )


if __name__ == "__main__":
    typer.run(main)

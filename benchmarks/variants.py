"""Our own settings against each other, in turn: what each costs or wins in tokens per second.

  placement   2 and 4 workers on this host, and shared memory, against one worker over gRPC
  invariance  batch-invariant mode against the default
  wire        rows on the wire in bfloat16 and int8 against float32, and what is lost by it
  overlap     two micro-batches in flight, against one
  tracing     1 % of traces sampled, to a collector that takes everything, against no tracing

Run: python benchmarks/variants.py placement [--batches 1,4,16] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from harness import options
from harness.collector import collecting
from harness.likeness import Likeness, compare_scores, likeness_table
from harness.load import FirstToken, Prompt, decode, first_token, random_prompts, run_load, score
from harness.phases import Measured, Phases, decode_point
from harness.result import Figure, Table, conclude, ratio_figure
from harness.serving import Served, Setup, serve
from harness.turns import Rules, Side, Turns, take_turns

from cluster.bench.latency import LoadSummary
from cluster.bench.workload import LoadRequest

STEPS = {1: 32, 4: 24, 16: 16}
PREFILL_TOKENS = 512
BATCH = "batch "
SAMPLING = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}


class Group(StrEnum):
    """What is compared."""

    placement = "placement"
    invariance = "invariance"
    wire = "wire"
    overlap = "overlap"
    tracing = "tracing"


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The reading of one prompt."""

    tokens_per_s: float
    phases: Phases


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plain setup and its variants, by name."""

    plain: tuple[str, Setup]
    variants: Mapping[str, Setup]
    batches: tuple[int, ...] = (1, 4, 16)
    prefill: bool = True
    lossy: bool = False


def main(
    group: Annotated[Group, typer.Argument(help="What is compared.")],
    batches: Annotated[str | None, typer.Option(help="Batch sizes, comma-separated.")] = None,
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes GROUP.json."""
    folder = options.checkpoint(model, quick)
    rules = options.rules(rounds, quick)
    if group is Group.tracing:
        _trace(folder, rules, out, quick)
        return
    comparison = COMPARISONS[group](folder)
    if batches is not None:
        comparison = replace(comparison, batches=tuple(map(int, batches.split(","))))
    _compare(group, comparison, rules, out, quick)


def _placement(folder: Path) -> Comparison:
    return Comparison(
        ("1 worker, gRPC", Setup(folder, settings=options.ON_GRPC)),
        {
            "1 worker, shared memory": Setup(folder, settings={"engine.shared_memory": "auto"}),
            "2 workers, gRPC": Setup(folder, workers=2, settings=options.ON_GRPC),
            "4 workers, gRPC": Setup(folder, workers=4, settings=options.ON_GRPC),
        },
    )


def _invariance(folder: Path) -> Comparison:
    both = {"engine.batch_invariant": "true", "worker.batch_invariant": "true"}
    return Comparison(
        ("default", Setup(folder, settings=options.ON_GRPC)),
        {"batch-invariant": Setup(folder, settings=options.ON_GRPC | both)},
    )


def _wire(folder: Path) -> Comparison:
    return Comparison(
        ("float32", Setup(folder, settings=options.ON_GRPC | {"engine.wire_dtype": "float32"})),
        {
            dtype: Setup(folder, settings=options.ON_GRPC | {"engine.wire_dtype": dtype})
            for dtype in ("bfloat16", "int8")
        },
        lossy=True,
    )


def _overlap(folder: Path) -> Comparison:
    return Comparison(
        ("off", Setup(folder, settings=options.ON_GRPC | {"engine.overlap": "off"})),
        {"on": Setup(folder, settings=options.ON_GRPC | {"engine.overlap": "on"})},
        batches=(16,),
    )


COMPARISONS: Mapping[Group, Callable[[Path], Comparison]] = {
    Group.placement: _placement,
    Group.invariance: _invariance,
    Group.wire: _wire,
    Group.overlap: _overlap,
}


def _compare(group: Group, comparison: Comparison, rules: Rules, out: Path, quick: bool) -> None:
    shape = options.read_shape(comparison.plain[1].model)
    plain, setup = comparison.plain
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    losses: list[tuple[str, Likeness]] = []
    points: list[dict[str, Any]] = []
    # All variants draw from these, because the side that they share would have others in its prefix cache.
    fresh = iter(random_prompts(1000, PREFILL_TOKENS, shape.vocabulary, seed=7))
    with serve(setup, shape.experts) as base:
        if comparison.lossy:
            texts = random_prompts(4, 32 if quick else 256, shape.vocabulary, seed=99)
            exact = score(base.router, texts)
        for name, variant in comparison.variants.items():
            with serve(variant, shape.experts) as other:
                sites = {plain: base, name: other}
                work = _workloads(comparison, sites, fresh, shape.vocabulary, quick)
                for what, measures in work.items():
                    turns = take_turns(
                        [Side(key, measure, sites[key].pids) for key, measure in measures.items()],
                        rules,
                        f"{name}, {what}",
                    )
                    figures.append(
                        ratio_figure(
                            _key(group, name, what),
                            f"{name} over {plain}, {what}",
                            turns,
                            name,
                            plain,
                            _speed,
                        )
                    )
                    rows.append(_row(turns, name, plain, what))
                    if what.startswith(BATCH):
                        batch = int(what.removeprefix(BATCH))
                        point = decode_point(turns, name, batch, "fp32", variant.workers)
                        points.append({"variant": name, **point})
                if comparison.lossy:
                    losses.append((name, compare_scores(exact, score(other.router, texts))))
    conclude(
        str(group),
        out,
        figures=figures,
        tables=[
            Table(
                "",
                ("variant", plain, "variant", "ratio", "bytes a token", "variant"),
                tuple(rows),
            ),
            *([likeness_table("", "variant", losses)] if losses else []),
        ],
        notes=["tokens per second; bytes a token: both ways, all layers"],
        data={"points": points, "shape": shape.config},
        quick=quick,
    )


def _workloads(
    comparison: Comparison,
    sites: Mapping[str, Served],
    fresh: Iterator[Prompt],
    vocabulary: int,
    quick: bool,
) -> dict[str, dict[str, Callable[[], Measured]]]:
    """What is measured, by its name: one callable a site."""
    work: dict[str, dict[str, Callable[[], Measured]]] = {}
    for batch in comparison.batches:
        prompts = random_prompts(batch, 32, vocabulary, seed=batch)
        steps = 6 if quick else STEPS.get(batch, 16)
        work[f"{BATCH}{batch}"] = {
            name: partial(decode, site.router, prompts, steps) for name, site in sites.items()
        }
    if comparison.prefill:
        work[f"prefill {PREFILL_TOKENS}"] = {
            name: partial(_prefill, site.router, fresh) for name, site in sites.items()
        }
    return work


def _prefill(router: str, fresh: Iterator[Prompt]) -> Prefilled:
    first: FirstToken = first_token(router, next(fresh))
    return Prefilled(PREFILL_TOKENS / first.seconds, replace(first.phases, tokens=PREFILL_TOKENS))


def _trace(folder: Path, rules: Rules, out: Path, quick: bool) -> None:
    """Traces belong to requests, so requests are what is measured: 24 short ones, 8 at a time."""
    vocabulary = options.read_shape(folder).vocabulary
    requests = [
        LoadRequest(prompt, 16) for prompt in random_prompts(8 if quick else 24, 32, vocabulary, seed=24)
    ]
    names = "off", "1 % sampled"
    with ExitStack() as stack:
        collector = stack.enter_context(collecting())
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, **SAMPLING}
        settings = options.ON_GRPC | {"engine.prefix_cache": "false"}
        sites = {
            names[0]: stack.enter_context(serve(Setup(folder, settings=settings))),
            names[1]: stack.enter_context(serve(Setup(folder, settings=settings, environment=environment))),
        }
        turns = take_turns(
            [Side(name, partial(_load, site.router, requests), site.pids) for name, site in sites.items()],
            rules,
            "tracing",
        )
    rates = [(name, f"{turns.median(name, float):.1f}") for name in names]
    title = "tokens/s with 1 % of traces sampled over tracing off"
    conclude(
        "tracing",
        out,
        figures=[ratio_figure("tracing", title, turns, names[1], names[0], float)],
        tables=[Table("", ("tracing", "tokens/s"), tuple(rates))],
        notes=[f"the collector got {collector.exports} exports"],
        quick=quick,
    )


def _load(router: str, requests: Sequence[LoadRequest]) -> float:
    return LoadSummary.of(run_load(router, requests, 8)).output_tokens_per_s


def _key(*words: str) -> str:
    return "-".join(words).lower().replace(", ", "-").replace(" ", "-")


def _row(turns: Turns[Measured], name: str, plain: str, what: str) -> tuple[str, ...]:
    ratio = turns.ratio(name, plain, _speed)

    def size(side: str) -> str:
        return f"{turns.median(side, lambda measured: measured.phases.bytes_per_token):,.0f}"

    return (
        f"{name}, {what}",
        f"{turns.median(plain, _speed):.1f}",
        f"{turns.median(name, _speed):.1f}",
        f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        size(plain),
        size(name),
    )


def _speed(measured: Measured) -> float:
    return measured.tokens_per_s


if __name__ == "__main__":
    typer.run(main)

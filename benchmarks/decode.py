"""Decode speed against `transformers` in one process: tokens per second at several batch sizes, with each kind of expert weights.

Ours: a router and one worker with all threads, over real gRPC (no lane), asked through the public API. Theirs: a process of
its own with its fastest experts and cache. Same weights, same prompts of 32 tokens, greedy, fp32 unless said; the clock
runs while all streams decode. All sides take turns; the others' processes must be idle meanwhile.

Run: python benchmarks/decode.py [--batches 1,4,16] [--experts fp32,int8] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from harness import options
from harness.likeness import Likeness, compare_scores
from harness.result import Figure, Table, conclude
from harness.serving import Served, Setup, serve
from harness.transformers_peer import TransformersPeer, transformers_peer
from harness.turns import Side, Turns, progress, take_turns
from harness.workload import Decoded, Phases, Prompt, decode, random_prompts, score

PROMPT_TOKENS = 32
# Steps of one measurement: long enough for a second or more.
STEPS = {1: 32, 4: 24, 16: 16}
THEIRS = "transformers"
# Another system keeps no account of its steps.
NO_PHASES = Phases({}, steps=0, sent_bytes=0, received_bytes=0, calls=0, tokens=0)


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    experts: Annotated[str, typer.Option(help="Kinds of expert weights, comma-separated.")] = "fp32,int8",
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes decode.json."""
    folder = options.checkpoint(model, quick)
    shape = options.read_shape(folder)
    kinds = experts.split(",")
    rules = options.rules(rounds, quick)
    figures: list[Figure] = []
    speeds: list[tuple[str, ...]] = []
    points: list[dict[str, Any]] = []
    with ExitStack() as stack:
        theirs = stack.enter_context(transformers_peer(folder, len(psutil.Process().cpu_affinity())))
        ours = {kind: stack.enter_context(serve(_setup(folder, kind))) for kind in kinds}
        choices = {}
        for batch in map(int, batches.split(",")):
            choices[batch] = theirs.choose(batch, PROMPT_TOKENS)
            progress(f"batch {batch}: transformers is fastest with {choices[batch]['choice']}")
            steps = 6 if quick else STEPS.get(batch, 16)
            prompts = random_prompts(batch, PROMPT_TOKENS, shape.vocabulary, seed=batch)
            sides = [
                Side(THEIRS, partial(_theirs, theirs, prompts, steps), (theirs.pid,)),
                *(
                    Side(kind, partial(decode, site.router, prompts, steps), site.pids)
                    for kind, site in ours.items()
                ),
            ]
            turns = take_turns(sides, rules, f"decode, batch {batch}")
            figures += [_figure(turns, kind, batch) for kind in kinds]
            speeds.append(_row(turns, kinds, batch, choices[batch]["choice"]))
            points += [_point(turns, kind, batch) for kind in kinds]
        errors = _errors(ours, shape.vocabulary, 32 if quick else 256)
    conclude(
        "decode",
        out,
        figures=figures,
        tables=[
            Table("", ("batch", "transformers", "with", *kinds, "same tokens"), tuple(speeds)),
            *_error_tables(errors),
        ],
        notes=["tokens per second; `same tokens`: share of greedy tokens that equal those of transformers"],
        data={"points": points, "choices": choices, "shape": shape.config},
        quick=quick,
    )


def _setup(folder: Path, kind: str) -> Setup:
    return Setup(folder, settings={"engine.shared_memory": "off", "worker.expert_dtype": kind})


def _theirs(peer: TransformersPeer, prompts: Sequence[Prompt], steps: int) -> Decoded:
    answer = peer.decode(prompts, steps)
    return Decoded(answer["tokens_per_s"], tuple(map(tuple, answer["token_ids"])), NO_PHASES)


def _figure(turns: Turns[Decoded], kind: str, batch: int) -> Figure:
    ratio = turns.ratio(kind, THEIRS, _speed)
    return Figure(
        f"decode-{kind}-b{batch}",
        f"decode over transformers, {kind} experts, batch {batch}",
        ratio.value,
        "x",
        ratio.low,
        ratio.high,
        sum(turns.disturbed),
    )


def _row(turns: Turns[Decoded], kinds: Sequence[str], batch: int, choice: str) -> tuple[str, ...]:
    shares = (f"{kind} {_same_tokens(turns.rounds[0], kind):.0%}" for kind in kinds)
    speeds = (f"{turns.median(side, _speed):.1f}" for side in (THEIRS, *kinds))
    theirs, *ours = speeds
    return (str(batch), theirs, choice, *ours, ", ".join(shares))


def _same_tokens(round_: Mapping[str, Decoded], kind: str) -> float:
    """Share of equal tokens over the length that both sides wrote, from the first on."""
    pairs = [
        mine == other
        for ours, theirs in zip(round_[kind].token_ids, round_[THEIRS].token_ids, strict=True)
        for mine, other in zip(ours, theirs, strict=False)
    ]
    return sum(pairs) / len(pairs)


def _point(turns: Turns[Decoded], kind: str, batch: int) -> dict[str, Any]:
    """What the scaling model is fitted to."""
    return {
        "experts": kind,
        "workers": 1,
        "rows": batch,
        "step_s": turns.median(kind, lambda decoded: batch / decoded.tokens_per_s),
        "compute_s": turns.median(kind, lambda decoded: decoded.phases.compute_s),
        "overhead_s": turns.median(kind, lambda decoded: decoded.phases.overhead_s),
        "router_s": turns.median(kind, lambda decoded: decoded.phases.router_s),
        "bytes": turns.median(kind, lambda decoded: decoded.phases.bytes_per_token) * batch,
    }


def _errors(ours: dict[str, Served], vocabulary: int, length: int) -> dict[str, Likeness]:
    """How the lossy kinds score the same prompts, against the first one named."""
    prompts = random_prompts(4, length, vocabulary, seed=99)
    exact, *others = ours
    reference = score(ours[exact].router, prompts)
    return {kind: compare_scores(reference, score(ours[kind].router, prompts)) for kind in others}


def _error_tables(errors: dict[str, Likeness]) -> list[Table]:
    if not errors:
        return []
    return [
        Table(
            "What the lossy kinds lose, on log probabilities of random prompts",
            ("experts", "mean error", "largest", "perplexity ratio"),
            tuple((kind, *likeness.cells) for kind, likeness in errors.items()),
        )
    ]


def _speed(decoded: Decoded) -> float:
    return decoded.tokens_per_s


if __name__ == "__main__":
    typer.run(main)

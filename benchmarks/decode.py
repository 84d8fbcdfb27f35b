"""Decode speed against `transformers` in one process, by batch size and kind of expert weights.

Ours is a router and one worker with all threads, over real gRPC (without shared memory), asked through the
public API. Theirs is a process of its own with its fastest experts and cache. Both have the same weights and
the same prompts of 32 tokens, decode greedily, and compute in fp32 unless said otherwise; the clock runs
while all streams decode. All sides take turns, and the processes of the others must be idle meanwhile.

Run: python benchmarks/decode.py [--batches 1,4,16] [--experts fp32,int8] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import typer
from harness import options
from harness.likeness import Likeness, compare_scores, likeness_table, same_tokens
from harness.load import Decoded, Prompt, decode, random_prompts, score
from harness.phases import Phases, decode_point
from harness.result import Figure, Table, conclude, ratio_figure
from harness.serving import Served, Setup, serve
from harness.transformers_peer import Peer, plain_transformers, running_peer
from harness.turns import Side, Turns, progress, take_turns

PROMPT_TOKENS = 32
# The steps of one measurement, enough for a second or more.
STEPS = {1: 32, 4: 24, 16: 16}
THEIRS = "transformers"
# transformers keeps no account of its steps.
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
        theirs = stack.enter_context(running_peer(plain_transformers(folder)))
        ours = {
            kind: stack.enter_context(
                serve(Setup(folder, settings=options.ON_GRPC | {"worker.expert_dtype": kind}))
            )
            for kind in kinds
        }
        choices = {}
        for batch in map(int, batches.split(",")):
            steps = 6 if quick else STEPS.get(batch, 16)
            prompts = random_prompts(batch, PROMPT_TOKENS, shape.vocabulary, seed=batch)
            tried = theirs.decode(prompts, steps)
            choices[batch] = {"choice": tried.decoding, "seconds": tried.decoding_trials_s}
            progress(f"batch {batch}: transformers is fastest with {tried.decoding}")
            sides = [
                Side(THEIRS, partial(_theirs, theirs, prompts, steps), (theirs.pid,)),
                *(
                    Side(kind, partial(decode, site.router, prompts, steps), site.pids)
                    for kind, site in ours.items()
                ),
            ]
            turns = take_turns(sides, rules, f"decode, batch {batch}")
            figures += [_figure(turns, kind, batch) for kind in kinds]
            speeds.append(_row(turns, kinds, batch, tried.decoding))
            points += [decode_point(turns, kind, batch, kind, workers=1) for kind in kinds]
        errors = _errors(ours, shape.vocabulary, 32 if quick else 256)
    title = "What the lossy kinds lose, on log probabilities of random prompts"
    conclude(
        "decode",
        out,
        figures=figures,
        tables=[
            Table("", ("batch", "transformers", "with", *kinds, "same tokens"), tuple(speeds)),
            *([likeness_table(title, "experts", errors)] if errors else []),
        ],
        notes=["tokens per second; `same tokens`: share of greedy tokens that equal those of transformers"],
        data={"points": points, "choices": choices, "shape": shape.config},
        quick=quick,
    )


def _theirs(peer: Peer, prompts: Sequence[Prompt], steps: int) -> Decoded:
    batch = peer.decode(prompts, steps)
    assert batch.summary.decode_tokens_per_s is not None
    return Decoded(batch.summary.decode_tokens_per_s, batch.token_ids, NO_PHASES)


def _figure(turns: Turns[Decoded], kind: str, batch: int) -> Figure:
    title = f"decode over transformers, {kind} experts, batch {batch}"
    return ratio_figure(f"decode-{kind}-b{batch}", title, turns, kind, THEIRS, _speed)


def _row(turns: Turns[Decoded], kinds: Sequence[str], batch: int, choice: str) -> tuple[str, ...]:
    first = turns.rounds[0]
    shares = (f"{kind} {same_tokens(first[kind].token_ids, first[THEIRS].token_ids):.0%}" for kind in kinds)
    theirs, *ours = (f"{turns.median(side, _speed):.1f}" for side in (THEIRS, *kinds))
    return (str(batch), theirs, choice, *ours, ", ".join(shares))


def _errors(ours: Mapping[str, Served], vocabulary: int, length: int) -> list[tuple[str, Likeness]]:
    """How the other kinds score the same prompts, against the first one named."""
    prompts = random_prompts(4, length, vocabulary, seed=99)
    exact, *others = ours
    reference = score(ours[exact].router, prompts)
    return [(kind, compare_scores(reference, score(ours[kind].router, prompts))) for kind in others]


def _speed(decoded: Decoded) -> float:
    return decoded.tokens_per_s


if __name__ == "__main__":
    typer.run(main)

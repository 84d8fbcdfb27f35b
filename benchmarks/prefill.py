"""Time to the first token of a long prompt, against `transformers` in one process.

Ours is asked through the real gRPC API: a router and one worker with all threads, in fp32, with a new random
prompt every time, so that no prefix is cached. Theirs has its fastest experts and cache, and computes logits
of the last position only.

Run: python benchmarks/prefill.py [--tokens 512] [--rounds 5]
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from harness import options
from harness.load import first_token, random_prompts
from harness.phases import Phases
from harness.result import Table, conclude, ratio_figure
from harness.serving import Setup, serve
from harness.transformers_peer import plain_transformers, running_peer
from harness.turns import Side, progress, take_turns

OURS, THEIRS = "ours", "transformers"


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    rounds: options.Rounds = 7,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes prefill.json."""
    folder = options.checkpoint(model, quick)
    fresh = iter(random_prompts(1000, tokens, options.read_shape(folder).vocabulary, seed=1))
    account: list[Phases] = []

    def ours(router: str) -> float:
        first = first_token(router, next(fresh))
        account.append(first.phases)
        return first.seconds

    setup = Setup(folder, settings=options.ON_GRPC)
    with running_peer(plain_transformers(folder)) as theirs, serve(setup) as site:
        choice = theirs.decode([next(fresh)], 0).reading
        progress(f"transformers is fastest with {choice}")
        first_token(site.router, next(fresh))
        turns = take_turns(
            (
                Side(OURS, partial(ours, site.router), site.pids),
                Side(THEIRS, lambda: theirs.decode([next(fresh)], 0).summary.prefill_s, (theirs.pid,)),
            ),
            options.rules(rounds, quick),
            f"prefill of {tokens}",
        )
    medians = [turns.median(side, float) for side in (OURS, THEIRS)]
    title = f"prefill of {tokens} tokens over transformers"
    conclude(
        "prefill",
        out,
        figures=[ratio_figure(f"prefill-{tokens}", title, turns, THEIRS, OURS, float)],
        tables=[
            Table(
                "",
                ("prompt", "ours ms", "transformers ms", "with", "ours tokens/s", "transformers tokens/s"),
                (
                    (
                        str(tokens),
                        *(f"{1000 * seconds:,.0f}" for seconds in medians),
                        choice,
                        *(f"{tokens / seconds:,.0f}" for seconds in medians),
                    ),
                ),
            )
        ],
        data={"points": [_point(account[len(account) // 2], tokens, medians[0])]},
        quick=quick,
    )


def _point(phases: Phases, tokens: int, seconds: float) -> dict[str, Any]:
    """The steps of a prompt, as the scaling model is fitted to them."""
    return {
        "experts": "fp32",
        "workers": 1,
        "rows": tokens / phases.steps,
        "step_s": seconds / phases.steps,
        "compute_s": phases.compute_s,
        "overhead_s": phases.overhead_s,
        "router_s": phases.router_s,
        "bytes": (phases.sent_bytes + phases.received_bytes) / phases.steps,
    }


if __name__ == "__main__":
    typer.run(main)

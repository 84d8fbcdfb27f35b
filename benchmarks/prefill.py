"""Time to the first token of a long prompt, against `transformers` in one process.

Ours through the real gRPC API, router and one worker with all threads, fp32, a new random prompt every time so that no
prefix is cached; theirs with its fastest experts and cache, logits of the last position only.

Run: python benchmarks/prefill.py [--tokens 512] [--rounds 5]
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import psutil
import typer
from harness import options
from harness.result import Figure, Table, conclude
from harness.serving import Setup, serve
from harness.transformers_peer import transformers_peer
from harness.turns import Side, progress, take_turns
from harness.workload import Phases, first_token, random_prompts

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
    shape = options.read_shape(folder)
    threads = len(psutil.Process().cpu_affinity())
    fresh = iter(random_prompts(1000, tokens, shape.vocabulary, seed=1))
    account: list[Phases] = []

    def ours(router: str) -> float:
        first = first_token(router, next(fresh))
        account.append(first.phases)
        return first.seconds

    with transformers_peer(folder, threads) as theirs, serve(_setup(folder)) as site:
        choice = theirs.choose(1, tokens, for_prefill=True)["choice"]
        progress(f"transformers is fastest with {choice}")
        first_token(site.router, next(fresh))
        turns = take_turns(
            (
                Side(OURS, partial(ours, site.router), site.pids),
                Side(THEIRS, lambda: float(theirs.prefill(next(fresh))["seconds"]), (theirs.pid,)),
            ),
            options.rules(rounds, quick),
            f"prefill of {tokens}",
        )
    speedup = turns.ratio(THEIRS, OURS, float)
    medians = [turns.median(side, float) for side in (OURS, THEIRS)]
    conclude(
        "prefill",
        out,
        figures=[
            Figure(
                f"prefill-{tokens}",
                f"prefill of {tokens} tokens over transformers",
                speedup.value,
                "x",
                speedup.low,
                speedup.high,
                sum(turns.disturbed),
            )
        ],
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


def _setup(folder: Any) -> Setup:
    return Setup(folder, settings={"engine.shared_memory": "off"})


def _point(phases: Phases, tokens: int, seconds: float) -> dict[str, Any]:
    """What the scaling model is fitted to."""
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

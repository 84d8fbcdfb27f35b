"""One MoE layer against hivemind's RemoteMixtureOfExperts, over loopback.

The layer has 8 SwiGLU experts 1024/3584, top-2, in f32. Both sides run once with one worker process that has
all threads, and once with two that share them; a client gates, sends, waits and combines, with new rows in
every call. Ours is the router's dispatcher over real gRPC (the direct stream, as routers use it between
hosts); judged is our one worker against the faster of theirs. Reported beside it are the same worker over
gRPC by the threads of grpcio alone, and over shared memory.

Needs an environment with hivemind (`--python`). Its processes run in a network namespace of their own, so the
user needs the right to make one.

Run: python benchmarks/hivemind_layer.py --python ENVIRONMENT/bin/python
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import options
from harness.one_transport import call_until_open, pool_of
from harness.result import Table, conclude, ratio_figure
from harness.serving import Served, Setup, serve
from harness.turns import Side, take_turns

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import describe_model
from moesaic.families.model import GateRule
from moesaic.routing_table import Snapshot
from router.control.cluster_watch import NamedWorkers
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.gating.gate import assign
from router.gating.model_view import ModelView, ViewRows
from router.phase_clock import PhaseClock
from router.server import SWITCH_INTERVAL_S
from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind

SIDE = Path(__file__).with_name("peers") / "hivemind_side.py"
# A namespace with nothing but loopback; all processes inside end with it.
NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
LOOPBACK = ("sh", "-c", 'ip link set lo up; exec "$@"', "sh")
START_TIMEOUT_S = 180.0
# Either side works for a while before its calls count: for some tens of milliseconds after a pause everything
# is slow, and the faster side would make all of its calls in that time.
WARM_UP_S, SPELL_S, MIN_CALLS = 0.5, 1.0, 12
WORKERS = (1, 2)
# The transports of our one worker that are reported beside the judged one.
OTHER_TRANSPORTS: dict[str, TransportKind] = {
    "ours, 1 worker, grpcio": GRPC,
    "ours, 1 worker, shared memory": SHARED_MEMORY,
}


class HivemindLayer:
    """The process of hivemind; it reads a number of tokens and answers milliseconds of each call."""

    def __init__(self, python: Path, workers: int) -> None:
        self._process = subprocess.Popen(
            [*NAMESPACE, *LOOPBACK, str(python), str(SIDE), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._process.pid
        self._answer()

    def measure(self, tokens: int) -> float:
        """Median milliseconds of a call."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return statistics.median(self._answer()["ms"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _answer(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("hivemind's side ended: run peers/hivemind_side.py by hand to see why")
        answer: dict[str, list[float]] = json.loads(line)
        return answer


class OurLayer:
    """Layer 0 of a served model, called from this process."""

    def __init__(self, served: Served, model: Path, kind: TransportKind) -> None:
        self._shape = options.read_shape(model)
        experts = describe_model(open_checkpoint(model)).addresses
        view = NamedWorkers(served.workers, model=model.name, experts=experts)
        snapshot = asyncio.run(_first(view))
        assert snapshot.epoch is not None
        self._views = (ViewRows(ModelView.plain(snapshot.epoch), 0, 0),)
        self._pool = pool_of(kind)
        self._pool.update(snapshot.table)
        self._dispatcher = Dispatcher(self._pool, PhaseClock(), DispatchRules(call_timeout_s=30.0))
        self._gate = torch.randn(self._shape.experts, self._shape.hidden) / self._shape.hidden**0.5
        self._rule = GateRule(top_k=self._shape.experts_per_token, renormalise=True)
        call_until_open(self._pool, kind, lambda: self._compute(torch.randn(1, self._shape.hidden)))

    @torch.inference_mode()
    def measure(self, tokens: int) -> float:
        """Median milliseconds of a call."""
        times: list[float] = []
        counts_from_s = time.perf_counter() + WARM_UP_S
        while len(times) < MIN_CALLS or time.perf_counter() < counts_from_s + SPELL_S:
            rows = torch.randn(tokens, self._shape.hidden)
            started_s = time.perf_counter()
            self._compute(rows)
            if started_s >= counts_from_s:
                times.append(1000 * (time.perf_counter() - started_s))
        return statistics.median(times)

    def close(self) -> None:
        self._pool.close()

    def _compute(self, rows: torch.Tensor) -> None:
        assignment = assign(torch.nn.functional.linear(rows, self._gate), self._rule)
        step = self._dispatcher.begin(self._views, deadline_s=time.monotonic() + 30.0)
        step.compute(0, rows, assignment.slots, assignment.weights)
        assert not step.failed


def main(
    python: Annotated[Path, typer.Option(help="Interpreter of an environment with hivemind.", exists=True)],
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes hivemind_layer.json."""
    folder = options.checkpoint(model, quick)
    # A router sets the same.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # hivemind's client sets the same: idle threads of this process would only take the workers' cores.
    torch.set_num_threads(1)
    figures, rows = [], []
    with ExitStack() as stack:
        ours: dict[str, OurLayer] = {}
        theirs: dict[int, HivemindLayer] = {}
        pids: dict[str, tuple[int, ...]] = {}
        for workers in WORKERS:
            served = stack.enter_context(serve(Setup(folder, workers=workers)))
            for name, kind in {_ours(workers): DIRECT, **(OTHER_TRANSPORTS if workers == 1 else {})}.items():
                pids[name] = served.pids
                ours[name] = stack.enter_context(contextlib.closing(OurLayer(served, folder, kind)))
            theirs[workers] = stack.enter_context(contextlib.closing(HivemindLayer(python, workers)))
        for tokens in (1, 16):
            turns = take_turns(
                [
                    *(Side(_theirs(n), partial(theirs[n].measure, tokens)) for n in WORKERS),
                    *(Side(name, partial(ours[name].measure, tokens), pids[name]) for name in ours),
                ],
                options.rules(rounds, quick),
                f"hivemind, {tokens} tokens",
            )
            fastest = min(map(_theirs, WORKERS), key=lambda side: turns.median(side, float))
            for key, name in ((f"hivemind-{tokens}", _ours(1)), *(("", name) for name in OTHER_TRANSPORTS)):
                title = f"one MoE layer over hivemind's, {name}, {tokens} tokens"
                figures.append(ratio_figure(key, title, turns, fastest, name, float))
            names = [*map(_theirs, WORKERS), *ours]
            rows.append((str(tokens), *(f"{turns.median(name, float):.1f}" for name in names)))
    conclude(
        "hivemind_layer",
        out,
        figures=figures,
        tables=[Table("Milliseconds a layer.", ("tokens", *map(_theirs, WORKERS), *ours), tuple(rows))],
        quick=quick,
    )


def _theirs(workers: int) -> str:
    return f"hivemind, {workers} server{'s' if workers > 1 else ''}"


def _ours(workers: int) -> str:
    return f"ours, {workers} worker{'s' if workers > 1 else ''}"


async def _first(view: NamedWorkers) -> Snapshot:
    async for snapshot in view.watch():
        return snapshot
    raise AssertionError("a view never ends")


if __name__ == "__main__":
    typer.run(main)

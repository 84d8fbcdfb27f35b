"""`moesaic demo`: starts a cluster on the built-in model, streams one answer and shows what it took.

The tables cover only the answer: counters are read before and after it, which leaves out the test token of
the start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from cluster.cli.router_client import router_client
from cluster.launch.milestones import Milestones
from cluster.launch.ports import with_ports
from cluster.launch.serve import CheckedModel, check_model, running_cluster
from cluster.observation.activity import Activity, activity_between
from cluster.observation.observer import Observation, Observer
from cluster.terminal.load_progress import LoadProgress
from cluster.terminal.tables import bar, count, new_table, size
from moesaic.errors import Unavailable
from moesaic.generate_request import GenerateOptions
from moesaic.settings import ClusterSettings, Settings
from moesaic.stop_signals import StopSignals

DEFAULT_PROMPT = "ROMEO:\n"
SAMPLING: GenerateOptions = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """The work of one worker for the answer. `resident_bytes`: the memory of the whole process."""

    name: str
    num_experts: int
    rows: int
    calls: int
    busy_s: float
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """The generated text, and its rate after the first token."""

    text: str
    num_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The results of a demo, as JSON prints them."""

    prompt: str
    answer: StreamedAnswer
    workers: tuple[WorkerShare, ...]
    phases_s: dict[str, float]
    # Seconds since the command began.
    milestones_s: dict[str, float]


async def run_demo(prompt: str | None, settings: Settings, *, max_tokens: int, as_json: bool) -> None:
    """Raises InvalidArgument for more workers than experts, Unavailable when the cluster cannot start."""
    model, settings = check_model(settings), with_ports(settings)
    out = Console(file=sys.stdout, highlight=False)
    if not as_json:
        _print_opening(out, model, settings.cluster)
    milestones = Milestones()
    with StopSignals() as signals:
        progress = LoadProgress(Console(stderr=True, quiet=as_json))
        async with running_cluster(settings, model, progress, milestones, signals) as endpoints:
            flow = None if as_json else _WordFlow(out)
            answering = _answer(endpoints.grpc, prompt or DEFAULT_PROMPT, max_tokens, milestones, flow)
            report = await signals.unless_stopped(answering)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _print_closing(out, report)


async def _answer(
    target: str, prompt: str, max_tokens: int, milestones: Milestones, flow: _WordFlow | None
) -> DemoReport:
    async with Observer(target, timeout_s=ASK_TIMEOUT_S) as observer:
        before = await observer.observe()
        answer = await _stream(target, prompt, max_tokens, milestones, flow)
        after = await observer.observe()
    activity = activity_between(before, after)
    return DemoReport(
        prompt=prompt,
        answer=answer,
        workers=tuple(_shares(after, activity)),
        phases_s=activity.phases_s,
        milestones_s=milestones.reached_s,
    )


async def _stream(
    target: str, prompt: str, max_tokens: int, milestones: Milestones, flow: _WordFlow | None
) -> StreamedAnswer:
    """Streams the answer; prompt and answer are written to `flow` as they arrive."""
    text, num_tokens, first_s = "", 0, time.monotonic()
    if flow is not None:
        flow.write(f"\n{prompt}")
    options: GenerateOptions = {**SAMPLING, "max_tokens": max_tokens}
    async with router_client(target) as client:
        async for token in client.generate(prompt, **options):
            if not num_tokens and token.token_ids:
                milestones.reach("first token")
                first_s = time.monotonic()
            num_tokens += len(token.token_ids)
            text += token.text
            if flow is not None:
                flow.write(token.text)
    if flow is not None:
        flow.end()
    elapsed_s = time.monotonic() - first_s
    return StreamedAnswer(text, num_tokens, (num_tokens - 1) / elapsed_s if elapsed_s > 0 else 0.0)


class _WordFlow:
    """Prints text that arrives in pieces, and breaks lines between words at the terminal's width."""

    def __init__(self, out: Console) -> None:
        self._file = out.file
        self._width = out.width
        self._column = 0
        self._word = ""

    def write(self, piece: str) -> None:
        for character in piece:
            if not character.isspace():
                self._word += character
                continue
            self._end_word()
            self._put(character)
        self._file.flush()

    def end(self) -> None:
        self._end_word()
        self._file.write("\n")
        self._file.flush()

    def _end_word(self) -> None:
        if self._column + len(self._word) > self._width and self._column:
            self._put("\n")
        self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._column = 0 if text == "\n" else self._column + len(text)


def _shares(after: Observation, activity: Activity) -> Iterator[WorkerShare]:
    """Raises Unavailable for a worker that does not answer: its figures would be wrong."""
    processes = {} if after.topology is None else {it.name: it for it in after.topology.processes}
    for worker in activity.workers:
        if worker.name not in processes:
            continue
        if not worker.answers:
            raise Unavailable(f"{worker.name} does not answer")
        yield WorkerShare(
            name=worker.name,
            num_experts=len(processes[worker.name].experts),
            rows=worker.rows,
            calls=worker.calls,
            busy_s=worker.busy_s,
            resident_bytes=after.workers[worker.name].resident_bytes,
        )


def _print_opening(out: Console, model: CheckedModel, cluster: ClusterSettings) -> None:
    shape = model.shape
    num_experts = len(shape.addresses)
    layer = shape.experts[0]  # all are alike
    holds_none = "the router holds" if cluster.routers == 1 else f"the {cluster.routers} routers hold"
    out.print(
        f"[bold]Moesaic[/]: {shape.num_layers} layers of {layer.num_slots} experts, {layer.top_k} a token. "
        f"{cluster.workers} worker processes hold the {num_experts} experts; {holds_none} none.\n"
    )


def _print_closing(out: Console, report: DemoReport) -> None:
    out.print()
    out.print(_worker_table(report.workers))
    out.print()
    out.print(_phase_table(report.phases_s))
    out.print()
    out.print(_milestone_table(report.milestones_s))
    answer = report.answer
    first_token_s = report.milestones_s["first token"]
    out.print(
        f"\nfirst token [bold]{first_token_s:.1f} s[/] after the command, then "
        f"{answer.tokens_per_s:.0f} tokens a second"
    )


def _worker_table(workers: Sequence[WorkerShare]) -> Table:
    table = new_table("who computed what", ">experts", ">calls", ">rows", "share of rows", ">busy", ">memory")
    all_rows = sum(worker.rows for worker in workers)
    for worker in workers:
        table.add_row(
            worker.name,
            count(worker.num_experts),
            count(worker.calls),
            count(worker.rows),
            bar(worker.rows / all_rows if all_rows else 0.0),
            f"{1000 * worker.busy_s:.0f} ms",
            size(worker.resident_bytes),
        )
    return table


def _phase_table(phases_s: Mapping[str, float]) -> Table:
    table = new_table("where the time went", ">seconds", ">share", "")
    total_s = sum(phases_s.values())
    for phase, seconds in sorted(phases_s.items(), key=lambda item: -item[1]):
        share = seconds / total_s if total_s else 0.0
        table.add_row(phase, f"{seconds:.3f}", f"{share:.0%}", bar(share))
    return table


def _milestone_table(milestones_s: Mapping[str, float]) -> Table:
    table = new_table("how the start went", ">after", ">took")
    before_s = 0.0
    for name, after_s in milestones_s.items():
        table.add_row(name, f"{after_s:.1f} s", f"{after_s - before_s:.1f} s")
        before_s = after_s
    return table

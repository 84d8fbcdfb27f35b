"""`moesaic demo`: starts a cluster on the built-in model, streams one answer and shows what it took.

Then the same answer again, while one of the workers that compute it is killed. The tables cover only the first
answer: counters are read before and after it, which leaves out the test token of the start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from cluster.cli.demo_drill import MIN_TOKENS, RETURN_TIMEOUT_S, Drill, run_drill
from cluster.cli.router_client import router_client
from cluster.launch.milestones import Milestones
from cluster.launch.ports import with_ports
from cluster.launch.serve import CheckedModel, check_model, running_cluster
from cluster.observation.activity import Activity, activity_between
from cluster.observation.observer import Observation, Observer
from cluster.terminal.load_progress import LoadProgress
from cluster.terminal.tables import bar, count, new_table, size
from cluster.terminal.word_flow import WordFlow
from moesaic import Client
from moesaic.client.generate_request import GenerateOptions
from moesaic.errors import DataLoss, Unavailable
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
    # The second act; None where there is only one copy of an expert.
    drill: Drill | None = None


async def run_demo(prompt: str | None, settings: Settings, *, max_tokens: int, as_json: bool) -> None:
    """Raises InvalidArgument for more workers than experts, Unavailable when the cluster cannot start, and
    DataLoss when the text differs after a worker was killed.
    """
    model, settings = check_model(settings), with_ports(settings)
    out = Console(file=sys.stdout, highlight=False)
    if not as_json:
        _print_opening(out, model, settings.cluster)
    milestones = Milestones()
    with StopSignals() as signals:
        progress = LoadProgress(Console(stderr=True, quiet=as_json))
        async with running_cluster(settings, model, progress, milestones, signals) as endpoints:
            play = _Play(endpoints.grpc, prompt or DEFAULT_PROMPT, max_tokens, None if as_json else out)
            report = await signals.unless_stopped(play.run(settings.cluster, milestones))
    if as_json:
        print(json.dumps(asdict(report)))
    _refuse_other_text(report.drill)


def _refuse_other_text(drill: Drill | None) -> None:
    if drill is not None and not drill.same_text:
        raise DataLoss(f"the text differs since {drill.worker} was killed", reason="TEXT_DIFFERS")


class _Play:
    """The two acts of a demo on a running cluster; without `out` nothing is printed."""

    def __init__(self, target: str, prompt: str, max_tokens: int, out: Console | None) -> None:
        self._target = target
        self._prompt = prompt
        self._options: GenerateOptions = {**SAMPLING, "max_tokens": max_tokens}
        self._out = out

    async def run(self, cluster: ClusterSettings, milestones: Milestones) -> DemoReport:
        async with (
            Observer(self._target, timeout_s=ASK_TIMEOUT_S) as observer,
            router_client(self._target) as client,
        ):
            report, after = await self._first_act(client, observer, milestones)
            if self._out is not None:
                _print_closing(self._out, report)
            if not _can_survive_a_kill(cluster, report.answer):
                return report
            return replace(report, drill=await self._second_act(client, observer, report, after))

    async def _first_act(
        self, client: Client, observer: Observer, milestones: Milestones
    ) -> tuple[DemoReport, Observation]:
        before = await observer.observe()
        flow = None if self._out is None else WordFlow(self._out)
        answer = await _stream(client, self._prompt, self._options, milestones, flow)
        after = await observer.observe()
        activity = activity_between(before, after)
        report = DemoReport(
            prompt=self._prompt,
            answer=answer,
            workers=tuple(_shares(after, activity)),
            phases_s=activity.phases_s,
            milestones_s=milestones.reached_s,
        )
        return report, after

    async def _second_act(
        self, client: Client, observer: Observer, report: DemoReport, seen: Observation
    ) -> Drill:
        busiest = max(report.workers, key=lambda worker: worker.rows)
        assert seen.topology is not None
        victim = next(process for process in seen.topology.processes if process.name == busiest.name)
        if self._out is not None:
            self._out.print(
                f"\nThe same request again. In the middle of it, {victim.name} is killed: every expert has "
                "another copy elsewhere."
            )
        drill = await run_drill(
            client,
            observer,
            victim,
            self._prompt,
            self._options,
            expected=report.answer.text,
            kill_after=report.answer.num_tokens // 3,
            flow=None if self._out is None else WordFlow(self._out),
        )
        if self._out is not None:
            _print_drill(self._out, drill)
        return drill


def _can_survive_a_kill(cluster: ClusterSettings, answer: StreamedAnswer) -> bool:
    """Whether every expert has a second copy, in a process of this machine, and the answer has a middle."""
    return cluster.replicas > 1 and cluster.address is None and answer.num_tokens >= MIN_TOKENS


async def _stream(
    client: Client, prompt: str, options: GenerateOptions, milestones: Milestones, flow: WordFlow | None
) -> StreamedAnswer:
    """Streams the answer; prompt and answer are written to `flow` as they arrive."""
    text, num_tokens, first_s = "", 0, time.monotonic()
    if flow is not None:
        flow.write(f"\n{prompt}")
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


def _print_drill(out: Console, drill: Drill) -> None:
    same = "[bold green]yes[/]" if drill.same_text else "[bold red]no[/]"
    out.print(
        f"\nsame text as without the kill: {same}; longest pause [bold]{1000 * drill.longest_pause_s:.0f} ms[/]"
    )
    if drill.back_after_s is None:
        out.print(f"[red]{drill.worker} is not back after {RETURN_TIMEOUT_S:.0f} s[/]")
    else:
        out.print(f"[green]{drill.worker} is back[/] {drill.back_after_s:.1f} s after it was killed")


def _worker_table(workers: Sequence[WorkerShare]) -> Table:
    table = new_table(
        *("who computed what", ">experts", ">calls", ">rows", "share of rows", ">busy", ">memory"),
        drop=("calls", "memory", "experts", "share of rows"),
    )
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
    table = new_table("where the time went", ">seconds", ">share", "", drop=("",))
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

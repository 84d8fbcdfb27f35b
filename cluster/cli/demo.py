"""`moesaic demo`: a cluster on the built-in model, one answer, and what it took.

The tables show the answer alone: counters are read before and after it, so that the start's own test token is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import grpc
from rich.console import Console
from rich.table import Table

from cluster.cli.router_client import router_client
from cluster.cli.status import ask_status
from cluster.launch.milestones import Milestones
from cluster.launch.serve import CheckedModel, check_model, running_cluster, with_ports
from cluster.terminal.load_progress import LoadProgress
from cluster.terminal.tables import bar, count, new_table, size
from moesaic import rpc
from moesaic.client import GenerateOptions
from moesaic.errors import from_rpc_error
from moesaic.settings import ClusterSettings, Settings
from moesaic.stop_signals import StopSignals
from moesaic.v1 import control_pb2, expert_pb2, expert_pb2_grpc

DEFAULT_PROMPT = "ROMEO:\n"
SAMPLING: GenerateOptions = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker did for the answer. `resident_bytes` is the whole process."""

    name: str
    num_experts: int
    rows: int
    calls: int
    busy_s: float
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated text, and how fast it came after its first token."""

    text: str
    num_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything that the demo shows."""

    prompt: str
    answer: Answer
    workers: tuple[WorkerShare, ...]
    phases_s: dict[str, float]
    # Since the command began.
    milestones_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Counters:
    """What the cluster has counted so far."""

    workers: tuple[control_pb2.Process, ...]
    stats: dict[str, expert_pb2.GetWorkerStatsResponse]
    phases_s: dict[str, float]


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
    before = await _read_counters(target)
    answer = await _stream(target, prompt, max_tokens, milestones, flow)
    after = await _read_counters(target)
    return DemoReport(
        prompt=prompt,
        answer=answer,
        workers=tuple(_share(worker, before.stats, after.stats) for worker in after.workers),
        phases_s={phase: s - before.phases_s.get(phase, 0.0) for phase, s in after.phases_s.items()},
        milestones_s=milestones.reached_s,
    )


async def _stream(
    target: str, prompt: str, max_tokens: int, milestones: Milestones, flow: _WordFlow | None
) -> Answer:
    """Writes prompt and answer to `flow` as they come."""
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
    return Answer(text, num_tokens, (num_tokens - 1) / elapsed_s if elapsed_s > 0 else 0.0)


class _WordFlow:
    """Text that comes in pieces, broken between words where the terminal's line ends."""

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


async def _read_counters(target: str) -> _Counters:
    status = await ask_status(target)
    processes = status.topology.processes if status.topology is not None else ()
    workers = tuple(
        process for process in processes if process.role == control_pb2.PROCESS_ROLE_EXPERT_WORKER
    )
    answers = await asyncio.gather(*(_ask_worker(worker.address) for worker in workers))
    return _Counters(
        workers,
        {worker.name: answer for worker, answer in zip(workers, answers, strict=True)},
        {phase.phase: phase.seconds for phase in status.stats.phases},
    )


async def _ask_worker(address: str) -> expert_pb2.GetWorkerStatsResponse:
    try:
        async with rpc.aio_channel(address) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            answer: expert_pb2.GetWorkerStatsResponse = await stub.GetWorkerStats(
                expert_pb2.GetWorkerStatsRequest(), timeout=ASK_TIMEOUT_S
            )
            return answer
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _share(
    worker: control_pb2.Process,
    before: Mapping[str, expert_pb2.GetWorkerStatsResponse],
    after: Mapping[str, expert_pb2.GetWorkerStatsResponse],
) -> WorkerShare:
    old = before.get(worker.name, expert_pb2.GetWorkerStatsResponse())
    new = after[worker.name]
    return WorkerShare(
        name=worker.name,
        num_experts=len(worker.experts),
        rows=new.rows - old.rows,
        calls=new.calls - old.calls,
        busy_s=new.busy_s - old.busy_s,
        resident_bytes=new.resident_bytes,
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

"""The report of a benchmark, and its tables for a terminal of 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cluster.bench.latency import LoadSummary, Percentiles, WaveSummary
from cluster.bench.machine import Machine
from cluster.observation.step_profile import StepProfile
from cluster.terminal.tables import count, new_table, size

# The number of levels that fit side by side in a table of 80 columns.
COLUMNS = 4
# Above this part of a core, the load generator itself may be what is measured.
BUSY_CLIENT_CORES = 0.5


@dataclass(frozen=True, slots=True)
class Level:
    """The load of one row: `streams` users in a closed loop, or arrivals at `rate` a second."""

    streams: int
    rate: float | None = None

    @property
    def label(self) -> str:
        return str(self.streams) if self.rate is None else f"{self.rate:g}/s"

    @property
    def title(self) -> str:
        return f"{self.streams} at once" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one level. `client_cores` is the CPU that the load generator took."""

    level: Level
    load: LoadSummary
    profile: StepProfile
    client_cores: float


@dataclass(frozen=True, slots=True)
class Duel:
    """Pairs of the same requests, served by the cluster and decoded as one batch by transformers.

    Failed pairs are left out and counted.
    """

    streams: int
    ours: tuple[WaveSummary, ...]
    theirs: tuple[WaveSummary, ...]
    # The fastest experts of transformers for prompts and for decoding, with " / " between them.
    experts: str
    sequences: int
    same_sequences: int
    failed_pairs: int


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All results of a benchmark, with the model, the load and the machine."""

    model: str
    epoch: str
    url: str
    prompt_len: str
    output_len: str
    shared_prefix: int
    seed: int
    machine: Machine
    used_by_others: float
    rows: tuple[Row, ...]
    duels: tuple[Duel, ...]


def print_report(report: BenchReport, out: Console) -> None:
    machine = report.machine
    out.print(f"[bold]{report.model}[/] at {report.url}, epoch {report.epoch}")
    out.print(
        f"{report.prompt_len} tokens in, {report.output_len} out"
        + (f", the first {report.shared_prefix} of every prompt the same" if report.shared_prefix else "")
        + f"; {machine.cpu}, {machine.cores} cores, torch {machine.packages.get('torch', 'none')}"
    )
    _section(out, _load_table(report.rows))
    for first in range(0, len(report.rows), COLUMNS):
        rows = report.rows[first : first + COLUMNS]
        _section(out, _phase_table(rows))
        _section(out, _step_table(rows))
        if rows[0].profile.workers:
            _section(out, _worker_table(rows))
    for duel in report.duels:
        _section(out, _duel_table(duel))
        out.print(_duel_note(duel), markup=False)
    for remark in _remarks(report.rows):
        out.print(remark, style="yellow", markup=False)


def _table(*columns: str) -> Table:
    """A table whose columns are closer together than elsewhere, because there are many."""
    table = new_table(*columns)
    table.padding = (0, 1, 0, 0)
    return table


def _section(out: Console, table: Table) -> None:
    out.print()
    out.print(table)


def _load_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "load", ">out tok/s", ">all tok/s", ">req/s", ">TTFT p50", ">p99", ">ITL p50", ">p99", ">err"
    )
    table.caption = "TTFT: time to the first token, ITL: between tokens, both in ms"
    table.caption_justify = "left"
    for row in rows:
        load = row.load
        table.add_row(
            row.level.label,
            f"{load.output_tokens_per_s:,.1f}",
            f"{load.total_tokens_per_s:,.1f}",
            f"{load.requests_per_s:.2f}",
            *_milliseconds(load.ttft),
            *_milliseconds(load.inter_token),
            f"[red]{load.failed_requests}[/]" if load.failed_requests else "0",
        )
    return table


def _milliseconds(times: Percentiles) -> Iterable[str]:
    """One decimal place below 100, none above; a dash where there was nothing to measure."""
    for ms in (times.p50_ms, times.p99_ms):
        yield "-" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"


def _phase_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of each phase, and its share of the step."""
    table = _table("where a step goes, ms", *(f">{row.level.label}" for row in rows))
    for phase in dict.fromkeys(phase for row in rows for phase in row.profile.phases_ms):
        table.add_row(phase, *(_phase(row.profile, phase) for row in rows))
    table.add_row("[bold]a step[/]", *(f"[bold]{row.profile.step_ms:.2f} 100%[/]" for row in rows))
    return table


def _phase(profile: StepProfile, phase: str) -> str:
    ms = profile.phases_ms.get(phase, 0.0)
    return f"{ms:.2f} {ms / profile.step_ms if profile.step_ms else 0.0:>4.0%}"


def _step_table(rows: Sequence[Row]) -> Table:
    table = _table("per step and token", *(f">{row.level.label}" for row in rows))
    lines: dict[str, Callable[[StepProfile], str]] = {
        "steps": lambda profile: count(profile.steps),
        "in two micro-batches": lambda profile: count(profile.overlapped_steps),
        "tokens a step": lambda profile: f"{profile.tokens_per_step:.1f}",
        "calls an output token": lambda profile: f"{profile.calls_per_output_token:.1f}",
        "bytes a token": lambda profile: size(round(profile.bytes_per_token)),
        "prefix cache hits": _prefix_hits,
        "router outside steps": lambda profile: f"{profile.outside_steps_share:.0%}",
    }
    for name, cell in lines.items():
        table.add_row(name, *(cell(row.profile) for row in rows))
    table.add_row("client, cores", *(f"{row.client_cores:.2f}" for row in rows))
    return table


def _prefix_hits(profile: StepProfile) -> str:
    return "-" if profile.prefix_hit_share is None else f"{profile.prefix_hit_share:.0%}"


def _worker_table(rows: Sequence[Row]) -> Table:
    table = _table("worker: busy, call p50", *(f">{row.level.label}" for row in rows))
    for index, worker in enumerate(rows[0].profile.workers):
        cells = (
            f"{each.busy_share:.0%} {_call(each.call_p50_us)}"
            for row in rows
            for each in row.profile.workers[index : index + 1]
        )
        table.add_row(f"{worker.name}\n{' '.join(worker.transports)}".rstrip(), *cells)
    return table


def _call(microseconds: int) -> str:
    return f"{microseconds / 1000:.2f} ms" if microseconds else ""


def _duel_table(duel: Duel) -> Table:
    """Medians of both sides and their ratio pair by pair; above 1, Moesaic is faster."""
    table = _table(f"{duel.streams} at once", ">moesaic", ">transformers", ">ratio", ">lowest", ">highest")
    decode = [
        (mine.decode_tokens_per_s, other.decode_tokens_per_s)
        for mine, other in zip(duel.ours, duel.theirs, strict=True)
        if mine.decode_tokens_per_s and other.decode_tokens_per_s
    ]
    whole = [
        (mine.output_tokens_per_s, other.output_tokens_per_s)
        for mine, other in zip(duel.ours, duel.theirs, strict=True)
    ]
    prefill = [
        (1 / mine.prefill_s, 1 / other.prefill_s) for mine, other in zip(duel.ours, duel.theirs, strict=True)
    ]
    _add_pairs(table, "decode, tokens/s", decode, lambda value: f"{value:,.1f}")
    _add_pairs(table, "all told, tokens/s", whole, lambda value: f"{value:,.1f}")
    _add_pairs(table, "to all first tokens, ms", prefill, lambda value: f"{1000 / value:,.1f}")
    return table


def _add_pairs(
    table: Table, name: str, pairs: Sequence[tuple[float, float]], cell: Callable[[float], str]
) -> None:
    if not pairs:
        table.add_row(name, "-", "-", "-", "-", "-")
        return
    ratios = [mine / other for mine, other in pairs]
    table.add_row(
        name,
        cell(statistics.median(mine for mine, _ in pairs)),
        cell(statistics.median(other for _, other in pairs)),
        f"[bold]{statistics.median(ratios):.2f}[/]",
        f"{min(ratios):.2f}",
        f"{max(ratios):.2f}",
    )


def _duel_note(duel: Duel) -> str:
    failed = f", {duel.failed_pairs} pairs failed" if duel.failed_pairs else ""
    return (
        f"{len(duel.ours)} pairs{failed}; the same tokens in {duel.same_sequences} of {duel.sequences} sequences; "
        f"transformers' experts: {duel.experts or '-'}"
    )


def _remarks(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        label = row.level.label
        for error, times in row.load.errors.items():
            yield f"{label}: {times} x {error}"
        if row.profile.preemptions:
            yield f"{label}: {row.profile.preemptions} sequences were put back: the KV cache was full"
        if row.client_cores > BUSY_CLIENT_CORES:
            yield f"{label}: the load generator took {row.client_cores:.1f} cores: it may be what was measured"
        failed_calls = sum(worker.failed_calls for worker in row.profile.workers)
        if failed_calls:
            yield f"{label}: {failed_calls} calls to workers failed"

"""The results of a drill, and their table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.bench.machine import Machine
from cluster.drill.answers import Tally
from cluster.drill.contract import Figures
from cluster.drill.experts import Outcome
from cluster.drill.faults import Fault
from cluster.drill.residue import Residue
from cluster.drill.timeline import Spread
from cluster.terminal.tables import count, new_table, size

MAX_ERROR_LINES = 3
# From this on the measuring program may be what was measured.
LATE_S = 0.1


@dataclass(frozen=True, slots=True)
class Mark:
    """A fault in the picture; seconds from the start of its case."""

    title: str
    start_s: float
    healed_s: float
    whole_s: float | None


@dataclass(frozen=True, slots=True)
class Picture:
    """Tokens a second over the time of a case. `turns`: start and end of every turn with faults."""

    step_s: float
    rates: tuple[float, ...]
    turns: tuple[tuple[float, float], ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class UnderLoad:
    """A fault under a steady load, beside the healthy control of the same minutes."""

    faults: int
    tally: Tally
    control: Tally
    # The longest pause of any stream around each fault, and in the control at the same places.
    pauses: Spread
    control_pauses: Spread
    # Pauses between tokens, all of them.
    token_gaps: Spread
    control_token_gaps: Spread
    tokens_per_s: float
    control_tokens_per_s: float
    # From the end of a fault until every process was READY.
    recovery: Spread
    # Calls that went to a worker whose answers were wrong; None where there was none.
    poisoned_calls: int | None
    # Of the program that measures: it shares the cores with what it measures.
    lateness: Spread
    control_lateness: Spread
    picture: Picture

    @property
    def throughput_ratio(self) -> float:
        return self.tokens_per_s / self.control_tokens_per_s if self.control_tokens_per_s else 0.0


@dataclass(frozen=True, slots=True)
class Cancels:
    """Clients that went away at random moments. `stop`: until the routers had nothing to do any more."""

    cancels: int
    stop: Spread
    leaked_blocks: int
    tally: Tally


@dataclass(frozen=True, slots=True)
class Overload:
    """More requests than the cluster can answer, at times that do not wait for answers."""

    peak_requests_per_s: float
    offered_requests_per_s: float
    peak_tokens_per_s: float
    # Tokens of whole answers.
    good_tokens_per_s: float
    refused: int
    refusals_without_retry_after: int
    refusal: Spread
    first_token: Spread
    tally: Tally

    @property
    def goodput_share(self) -> float | None:
        """Tokens of whole answers over the most that is possible; None where nothing was possible."""
        return self.good_tokens_per_s / self.peak_tokens_per_s if self.peak_tokens_per_s else None


@dataclass(frozen=True, slots=True)
class Case:
    """One fault on one cluster. `broken`: what of the contract does not hold; `notes`: what else one should know."""

    title: str
    fault: Fault
    # What the cluster consists of, in words.
    cluster: str
    model: str
    figures: Figures
    broken: tuple[str, ...]
    notes: tuple[str, ...] = ()
    under_load: UnderLoad | None = None
    cancels: Cancels | None = None
    overload: Overload | None = None
    before: Residue | None = None
    after: Residue | None = None
    # What came of changes of experts with a fault in their middle.
    changes: Mapping[Outcome, int] | None = None


@dataclass(frozen=True, slots=True)
class DrillReport:
    """All cases of a drill, with the load and the machine. `minutes`: of every fault, and of every control."""

    seed: int
    minutes: float
    streams: int
    machine: Machine
    used_by_others: float
    cases: tuple[Case, ...] = field(default_factory=tuple)

    @property
    def holds(self) -> bool:
        return not any(case.broken for case in self.cases)


def print_report(report: DrillReport, out: Console) -> None:
    machine = report.machine
    out.print(
        f"{report.streams} streams, {report.minutes:g} minutes each, seed {report.seed}; "
        f"{machine.cpu}, {machine.cores} cores, "
        f"{report.used_by_others:.0%} used by others"
    )
    out.print()
    out.print(_table(report.cases))
    for case in report.cases:
        out.print(f"\n[bold]{case.title}[/]: {case.model}, {case.cluster}")
        for line in _lines(case):
            out.print(line, soft_wrap=True)
    verdict = (
        "[bold green]the contract holds[/]" if report.holds else "[bold red]the contract does not hold[/]"
    )
    out.print(f"\n{verdict}")


def _table(cases: Iterable[Case]) -> Table:
    table = new_table(
        "fault",
        *(
            ">times",
            ">requests",
            ">lost",
            ">wrong",
            ">mixed",
            ">pause p50",
            ">p99",
            ">max",
            ">control p99",
            ">rate",
        ),
        *(">whole", "contract"),
        drop=("requests", "control p99", "p50", "rate"),
    )
    table.caption = (
        "pause: the longest of any stream around a fault, s; rate: tokens over the control's; "
        "whole: until all are READY, s, the longest"
    )
    table.caption_justify = "left"
    for case in cases:
        table.add_row(*row_of(case).values(), "[red]broken[/]" if case.broken else "[green]holds[/]")
    return table


def row_of(case: Case) -> Mapping[str, str]:
    """The figures of a case as text, by column; a dash where there is none."""
    load = case.under_load
    figures = case.figures
    tally = _tally(case)
    return {
        "fault": case.title,
        "times": count(load.faults if load else case.cancels.cancels if case.cancels else tally.requests),
        "requests": count(tally.requests),
        "lost": count(figures.lost),
        "wrong tokens": count(figures.wrong_tokens),
        "mixed": count(figures.mixed),
        "pause p50": seconds(load.pauses.p50_s) if load else "-",
        "pause p99": seconds(load.pauses.p99_s) if load else "-",
        "pause max": seconds(load.pauses.max_s) if load else "-",
        "control p99": seconds(load.control_pauses.p99_s) if load else "-",
        "rate": f"{load.throughput_ratio:.2f}" if load else "-",
        "whole again": seconds(load.recovery.max_s) if load else "-",
    }


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{1000 * value_s:.0f}"


def _tally(case: Case) -> Tally:
    of = case.under_load or case.cancels or case.overload
    assert of is not None  # a case has one of the three
    return of.tally


def _lines(case: Case) -> Iterator[str]:
    """What a table has no room for."""
    yield from (f"[red]broken: {escape(sentence)}[/]" for sentence in case.broken)
    yield from (f"[yellow]{escape(sentence)}[/]" for sentence in case.notes)
    yield from map(escape, details(case))


def details(case: Case) -> Iterator[str]:
    """Sentences about a case: errors by number, and what belongs to its kind of fault alone."""
    errors = sorted(_tally(case).errors.items(), key=lambda item: -item[1])
    yield from (f"{times} x {error}" for error, times in errors[:MAX_ERROR_LINES])
    if case.under_load is not None and case.under_load.tally.refused:
        yield f"{case.under_load.tally.refused} refusals with Retry-After, whose clients came back"
    if case.under_load is not None and case.under_load.poisoned_calls is not None:
        yield (
            f"a worker that answered wrongly was asked for {seconds(case.figures.quarantine_s)} s, and got "
            f"{case.under_load.poisoned_calls} calls in all"
        )
    if case.under_load is not None:
        yield _gaps(case.under_load)
        yield from _lateness(case.under_load)
    if case.cancels is not None:
        stop = case.cancels.stop
        yield (
            f"work stopped p50 {seconds(stop.p50_s)} s, p99 {seconds(stop.p99_s)} s after the clients had left; "
            f"{case.cancels.leaked_blocks} KV blocks in use afterwards"
        )
    if case.overload is not None:
        yield _overload(case.overload)
    if case.changes is not None:
        yield _changes(case.changes)
    if case.before is not None and case.after is not None:
        yield _residue(case.before, case.after)


def _gaps(load: UnderLoad) -> str:
    return (
        f"between two tokens of a stream p99 {milliseconds(load.token_gaps.p99_s)} ms, "
        f"in the control {milliseconds(load.control_token_gaps.p99_s)} ms"
    )


def _lateness(load: UnderLoad) -> Iterator[str]:
    late, control = load.lateness, load.control_lateness
    if max(late.max_s or 0.0, control.max_s or 0.0) > LATE_S:
        yield (
            f"the drill itself was late, p99 {seconds(late.p99_s)} s, at most {seconds(late.max_s)} s, and in the "
            f"control {seconds(control.p99_s)} and {seconds(control.max_s)} s: the pauses contain that"
        )


def _overload(overload: Overload) -> str:
    share = "" if overload.goodput_share is None else f", {overload.goodput_share:.2f} of the peak"
    return (
        f"{overload.offered_requests_per_s:.1f} requests a second offered, {overload.peak_requests_per_s:.1f} at the "
        f"peak; goodput {overload.good_tokens_per_s:.0f} of {overload.peak_tokens_per_s:.0f} tokens/s{share}; "
        f"{overload.refused} refused, p50 {milliseconds(overload.refusal.p50_s)} ms, "
        f"p99 {milliseconds(overload.refusal.p99_s)} ms, "
        f"{overload.refusals_without_retry_after} without Retry-After; first token p50 "
        f"{seconds(overload.first_token.p50_s)} s, p99 {seconds(overload.first_token.p99_s)} s"
    )


def _changes(changes: Mapping[Outcome, int]) -> str:
    committed, left, torn = (changes.get(outcome, 0) for outcome in Outcome)
    return (
        f"{committed + left + torn} changes of experts with a fault in their middle: {committed} were committed, "
        f"{left} left the old epoch, {torn} neither"
    )


def _residue(before: Residue, after: Residue) -> str:
    return (
        f"before and after: {before.processes} and {after.processes} processes, {size(before.resident_bytes)} and "
        f"{size(after.resident_bytes)} resident, {size(before.shared_bytes)} and {size(after.shared_bytes)} of it shared, "
        f"{before.descriptors} and {after.descriptors} descriptors, {before.threads} and {after.threads} threads"
    )

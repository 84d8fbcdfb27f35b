"""`moesaic bench`: a load through the real API, and what the cluster did meanwhile.

The command starts a cluster of its own, or measures a server that already runs. Bad input is reported before
anything is started.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.bench.latency import LoadSummary, RequestRecord, WaveSummary
from cluster.bench.load import CompletionsApi, Send, ask_model_name, closed_loop, completions_api, open_loop
from cluster.bench.machine import describe_machine
from cluster.bench.other_load import QUIET_SHARE, share_used_by_others
from cluster.bench.progress import BenchProgress
from cluster.bench.report import BenchReport, Duel, Level, Row, print_report
from cluster.bench.transformers_peer import PlainBatch, TransformersPeer, program, transformers_peer
from cluster.bench.workload import (
    Lengths,
    LoadRequest,
    Workload,
    parse_numbers,
    parse_rates,
    poisson_arrivals,
)
from cluster.launch.milestones import Milestones
from cluster.launch.ports import with_ports
from cluster.launch.serve import CheckedModel, check_model, running_cluster
from cluster.observation.activity import activity_between
from cluster.observation.observer import Observer
from cluster.observation.step_profile import profile_steps
from cluster.terminal.load_progress import LoadProgress
from moesaic.errors import InvalidArgument, Unavailable
from moesaic.garbage import freeze_lasting_objects
from moesaic.settings import Settings
from moesaic.stop_signals import StopRequested, StopSignals

DEFAULT_CONCURRENCY = "1,4,16,64"
# Enough requests and rounds for a meaningful median.
MIN_REQUESTS = 8
ROUNDS = 2
OPEN_LOOP_S = 20.0
# A warm-up has as many streams as its row and prompts of the same length, but short answers.
WARM_UP_TOKENS = 16
WARM_UP_STREAMS = 4
CHART_FORMATS = (".png", ".svg")

Peer = AbstractAsyncContextManager[TransformersPeer | None]


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """The measurements to take."""

    workload: Workload
    levels: tuple[Level, ...]
    # The number of requests in every row; None lets each row choose.
    requests: int | None
    # How many times the cluster and transformers take turns; 0 leaves transformers out.
    pairs: int

    def num_requests(self, level: Level) -> int:
        if self.requests is not None:
            return self.requests
        if level.rate is not None:
            return max(MIN_REQUESTS, math.ceil(level.rate * OPEN_LOOP_S))
        return max(MIN_REQUESTS, ROUNDS * level.streams)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the results go: tables or JSON on standard output, and optional files."""

    as_json: bool
    save: Path | None
    chart: Path | None

    def check(self) -> None:
        """Checks, before anything is measured, that the files can be written. Raises InvalidArgument."""
        for field, file in (("save", self.save), ("chart", self.chart)):
            if file is not None and not file.parent.is_dir():
                raise InvalidArgument(f"{field}: no such folder", field=field)
        if self.chart is not None:
            if self.chart.suffix not in CHART_FORMATS:
                raise InvalidArgument(f"chart: must end with {' or '.join(CHART_FORMATS)}", field="chart")
            importlib.import_module("matplotlib")  # A missing library is reported now.

    def deliver(
        self, content: Mapping[str, object], draw: Callable[[Path], None], show: Callable[[Console], None]
    ) -> None:
        """Saves and draws a report, and prints it as JSON or shows its tables."""
        text = json.dumps(content)
        if self.save is not None:
            self.save.write_text(text + "\n")
        if self.chart is not None:
            draw(self.chart)
        if self.as_json:
            print(text)
        else:
            show(Console(file=sys.stdout, highlight=False))


@dataclass(frozen=True, slots=True)
class Site:
    """The server to measure.

    `router` is HOST:PORT of one of its routers, through which the others are found.
    """

    url: str
    router: str
    model: str


def make_plan(
    *,
    concurrency: str | None,
    rate: str | None,
    prompt_len: str,
    output_len: str,
    shared_prefix: int,
    requests: int | None,
    seed: int,
    against: str | None,
    pairs: int,
) -> BenchPlan:
    """The flags as a plan.

    Without `concurrency` and `rate`, the default concurrency is used. Raises InvalidArgument.
    """
    workload = Workload(
        prompt=Lengths.parse(prompt_len, field="prompt_len"),
        output=Lengths.parse(output_len, field="output_len"),
        shared_prefix=shared_prefix,
        seed=seed,
    )
    if concurrency is None and rate is None:
        concurrency = DEFAULT_CONCURRENCY
    levels = (
        [Level(streams) for streams in parse_numbers(concurrency, field="concurrency")] if concurrency else []
    )
    levels += [Level(0, each) for each in parse_rates(rate, field="rate")] if rate else []
    if against is not None:
        _check_comparable(against, workload, levels)
    return BenchPlan(workload, tuple(levels), requests, pairs if against else 0)


def _check_comparable(against: str, workload: Workload, levels: Sequence[Level]) -> None:
    if against != "transformers":
        raise InvalidArgument("against: must be transformers", field="against")
    if all(level.rate is not None for level in levels):
        raise InvalidArgument("against: compares batches: give --concurrency", field="against")
    for field, lengths in (("prompt_len", workload.prompt), ("output_len", workload.output)):
        if not lengths.is_fixed:
            raise InvalidArgument(f"{field}: must be one number with --against", field=field)


async def bench_own_cluster(settings: Settings, plan: BenchPlan, outputs: Outputs) -> None:
    """Measures a cluster that is started for the benchmark and ends with it. Raises MoesaicError."""
    outputs.check()
    model = check_model(settings)
    plan.workload.check(model.shape.context_length(settings.engine.max_model_len))
    settings = with_ports(settings)
    console = Console(stderr=True, highlight=False)
    used_by_others = await _look_at_the_machine(console)
    with _delivering(outputs, console) as report, StopSignals() as signals:
        progress = LoadProgress(Console(stderr=True))
        async with running_cluster(settings, model, progress, Milestones(), signals) as endpoints:
            site = Site(f"http://{endpoints.http}", endpoints.grpc, model.name)
            peer = _peer(plan, settings, model)
            await signals.unless_stopped(_measure(site, plan, peer, used_by_others, console, report))


async def bench_server(url: str, router: str, plan: BenchPlan, outputs: Outputs) -> None:
    """Measures the server at `url` (http://HOST:PORT). Raises MoesaicError."""
    if plan.pairs:
        raise InvalidArgument(
            "against: needs the model's folder: give MODEL instead of --url", field="against"
        )
    outputs.check()
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument("url: must begin with http:// or https://", field="url")
    console = Console(stderr=True, highlight=False)
    site = Site(url, router, await ask_model_name(url))
    used_by_others = await _look_at_the_machine(console)
    with _delivering(outputs, console) as report, StopSignals() as signals:
        await signals.unless_stopped(_measure(site, plan, nullcontext(), used_by_others, console, report))


async def _look_at_the_machine(console: Console) -> float:
    share = await share_used_by_others()
    if share > QUIET_SHARE:
        console.print(
            f"warning: other programs use {share:.0%} of this machine's CPU time: figures will be too low",
            style="yellow",
            soft_wrap=True,
        )
    return share


def _peer(plan: BenchPlan, settings: Settings, model: CheckedModel) -> Peer:
    if not plan.pairs:
        return nullcontext()
    return transformers_peer(program(model.folder, settings.dtype, settings.device, model.shape.dtype))


@contextmanager
def _delivering(outputs: Outputs, console: Console) -> Iterator[Callable[[BenchReport], None]]:
    """Takes reports, each with more than the one before, and delivers the last; also after a signal."""
    reports: list[BenchReport] = []
    try:
        yield reports.append
    except StopRequested:
        if reports:
            console.print("stopped: the report is of what was measured until then", style="yellow")
            _deliver(reports[-1], outputs)
        raise
    _deliver(reports[-1], outputs)


async def _measure(
    site: Site,
    plan: BenchPlan,
    peer_process: Peer,
    used_by_others: float,
    console: Console,
    report: Callable[[BenchReport], None],
) -> None:
    """Reports after every row and comparison.

    The peer starts first, so that a model that it cannot load is told before anything is measured.
    """
    async with (
        Observer(site.router) as observer,
        completions_api(site.url, site.model) as api,
        peer_process as peer,
    ):
        model = (await observer.observe()).model
        plan.workload.check(model.max_model_len)
        freeze_lasting_objects()  # a collection of this program's own would look like a pause of the server
        run = _Run(plan, observer, api, model.vocab_size)
        found = BenchReport(
            model=site.model,
            epoch=model.epoch,
            url=site.url,
            prompt_len=str(plan.workload.prompt),
            output_len=str(plan.workload.output),
            shared_prefix=plan.workload.shared_prefix,
            seed=plan.workload.seed,
            machine=describe_machine(),
            used_by_others=used_by_others,
            rows=(),
            duels=(),
        )
        with BenchProgress(console) as progress:
            for level in plan.levels:
                found = replace(found, rows=(*found.rows, await run.row(level, progress)))
                report(found)
            for level in plan.levels:
                if peer is not None and level.rate is None:
                    duel = await run.duel(level.streams, peer, progress)
                    found = replace(found, duels=(*found.duels, duel))
                    report(found)


class _Run:
    """One benchmark of one server."""

    def __init__(self, plan: BenchPlan, observer: Observer, api: CompletionsApi, vocab_size: int) -> None:
        self._plan = plan
        self._observer = observer
        self._api = api
        self._vocab_size = vocab_size

    async def row(self, level: Level, progress: BenchProgress) -> Row:
        """Measures one row of the table, after a warm-up that is not counted."""
        await self._warm_up(level.streams or WARM_UP_STREAMS, level.title, progress)
        requests = self._requests(self._plan.num_requests(level), level.label)
        before = await self._observer.observe()
        cpu_s, start_s = time.process_time(), time.perf_counter()
        records = await self._load(
            level, requests, progress.counted(level.title, len(requests), self._api.send)
        )
        cpu_s, elapsed_s = time.process_time() - cpu_s, time.perf_counter() - start_s
        after = await self._observer.observe()
        return Row(
            level=level,
            load=LoadSummary.of(records),
            profile=profile_steps(activity_between(before, after)),
            client_cores=cpu_s / elapsed_s,
        )

    async def _load(self, level: Level, requests: Sequence[LoadRequest], send: Send) -> list[RequestRecord]:
        if level.rate is None:
            return await closed_loop(send, requests, level.streams)
        arrivals_s = poisson_arrivals(level.rate, len(requests), self._plan.workload.seed)
        return await open_loop(send, requests, arrivals_s)

    async def duel(self, streams: int, peer: TransformersPeer, progress: BenchProgress) -> Duel:
        """Takes turns with the same requests: all at once here, one batch there.

        The first pair warms both sides up.
        """
        ours: list[WaveSummary] = []
        theirs: list[PlainBatch] = []
        same, failed = 0, 0
        for number in range(self._plan.pairs + 1):
            turn = f"pair {number} of {self._plan.pairs}" if number else "warm-up"
            label = f"{streams} against transformers, {turn}"
            requests = self._requests(streams, label)
            records = await self._wave(requests, progress.counted(label, streams, self._api.send))
            batch = await peer.run(requests)
            if number == 0:
                continue
            if any(record.error for record in records):
                failed += 1
                continue
            ours.append(WaveSummary.of(records))
            theirs.append(batch)
            same += sum(
                record.token_ids == tokens for record, tokens in zip(records, batch.token_ids, strict=True)
            )
        return Duel(
            streams=streams,
            ours=tuple(ours),
            theirs=tuple(batch.summary for batch in theirs),
            experts=theirs[-1].experts if theirs else "",
            sequences=streams * len(ours),
            same_sequences=same,
            failed_pairs=failed,
        )

    async def _wave(self, requests: Sequence[LoadRequest], send: Send) -> list[RequestRecord]:
        """Sends all requests at once; returns the records in the order of the requests."""
        start_s = time.perf_counter()
        return list(await asyncio.gather(*(send(request, start_s) for request in requests)))

    async def _warm_up(self, streams: int, label: str, progress: BenchProgress) -> None:
        label = f"{label}, warm-up"
        requests = [
            replace(request, output_tokens=min(request.output_tokens, WARM_UP_TOKENS))
            for request in self._requests(streams, label)
        ]
        await closed_loop(progress.counted(label, streams, self._api.send), requests, streams)

    def _requests(self, count: int, batch: str) -> list[LoadRequest]:
        return self._plan.workload.requests(count, self._vocab_size, batch=batch)


def _draw(report: BenchReport, file: Path) -> None:
    from cluster.bench.chart import draw_chart

    draw_chart(report, file)


def _deliver(report: BenchReport, outputs: Outputs) -> None:
    """Prints, saves and draws the report.

    Raises Unavailable when requests failed, so that no figure hides it.
    """
    outputs.deliver(asdict(report), partial(_draw, report), partial(print_report, report))
    failed = sum(row.load.failed_requests for row in report.rows)
    if failed:
        raise Unavailable(f"{failed} of {sum(row.load.requests for row in report.rows)} requests failed")

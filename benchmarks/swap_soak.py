"""Changes in a row under load: experts are swapped, added and removed while eight streams are always being answered.

The demo model runs in float32 behind workers, routers and a controller, started by hand or, with --over-ray, by
`moesaic serve`. A cycle of eight changes, each a moment after every router has the one before, alternates with a spell of
the same length without any. Every answer must be computed in one epoch from its first token to its last, and each of its tokens must be the one that transformers
chooses with the weights of that epoch put in by hand. Throughput and gaps between tokens are compared with the spells
without changes, and memory with what it was after the first cycle, which is not counted.

Exits with 1 if a request failed, versions were mixed, a token was another one, or a worker holds more than before.

Run: python benchmarks/swap_soak.py [--changes 1000] [--routers 2 --replicas 2]
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated

import psutil
import typer
from harness import options
from harness.load import quantile
from harness.noisy_experts import NoisyBundle, distance_from_greedy, load_reference, write_noisy_bundle
from harness.ray_serving import serve_over_ray
from harness.result import Figure, Result, Table, conclude
from harness.serving import Served, Setup, serve
from harness.turns import progress
from transformers.utils.logging import disable_progress_bar

from cluster.bundles.controller_client import ControllerClient, controller_client, find_controller
from moesaic import Client, rpc
from moesaic.client.completion import Token
from moesaic.errors import MoesaicError
from moesaic.v1 import control_pb2, expert_pb2, expert_pb2_grpc

STREAMS = 8
ANSWER_TOKENS = 48
PROMPTS = (
    "ROMEO:\n",
    "Once upon a time",
    "def main(",
    "The state of the Union",
    "12 + 7 =",
    "My fellow citizens, I",
    "KING HENRY:\nNow is the",
    "import os\n",
)
# What each change of a cycle does, with which bundle. The cycle ends where it began.
CYCLE = (
    ("swap", "a"),
    ("add", "m"),
    ("swap", "b"),
    ("remove", "m"),
    ("swap", "c"),
    ("add", "n"),
    ("swap", "b"),
    ("remove", "n"),
)
KINDS = {
    "swap": control_pb2.CHANGE_KIND_SWAP,
    "add": control_pb2.CHANGE_KIND_ADD,
    "remove": control_pb2.CHANGE_KIND_REMOVE,
}
# Logits of two orders of summation differ by less: who chooses the second of two that are so close is not wrong.
TIE = 1e-3
# Full of prefixes after the first cycle, so that its pages do not count as growth.
SMALL_CACHE = {"engine.kv_cache_mib": "8"}
SETTLE_TIMEOUT_S = 120.0
MEGABYTE = 1_000_000
# The names of the bundles that an epoch has.
State = frozenset[str]


@dataclass(slots=True)
class Answer:
    """An answer as it arrived; times are readings of `time.perf_counter`."""

    prompt: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    # Every epoch that any part of the reply names.
    epochs: set[str] = field(default_factory=set)
    # Whether the reply's versions cover all of its tokens.
    is_covered: bool = False

    def take(self, token: Token) -> None:
        self.prompt = self.prompt if token.prompt is None else token.prompt.token_ids
        self.token_ids += token.token_ids
        self.times_s += [time.perf_counter()] * len(token.token_ids)
        self.epochs |= {token.epoch, *(span.version for span in token.weight_versions)}
        if token.finish_reason:
            spans = [(span.start, span.end) for span in token.weight_versions]
            self.is_covered = spans == [(0, len(self.token_ids))]


@dataclass(slots=True)
class Traffic:
    """All answers, and the errors of those that failed."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def tokens_per_s(self, spell: Spell) -> float:
        return sum(spell.holds(time_s) for each in self.answers for time_s in each.times_s) / spell.seconds

    def gaps_s(self, spell: Spell) -> list[float]:
        return [
            later - earlier
            for answer in self.answers
            for earlier, later in pairwise(answer.times_s)
            if spell.holds(later)
        ]


@dataclass(frozen=True, slots=True)
class Spell:
    """A stretch of time, by `time.perf_counter`."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def holds(self, time_s: float) -> bool:
        return self.start_s <= time_s < self.end_s


@dataclass(frozen=True, slots=True)
class Changed:
    """A change, with the seconds from the command until it was committed, and until every router had it."""

    word: str
    committed_s: float
    spread_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes resident, by process, and bytes of experts that each worker holds."""

    resident: Mapping[str, int]
    held: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the answers are worth."""

    num_checked: int
    num_mixed: int
    num_wrong: int
    num_ties: int
    # How many different answers there were, to all prompts together.
    num_different: int
    num_by_state: Mapping[str, int]


@dataclass(slots=True)
class Run:
    """What was seen; pairs of spells with and without changes."""

    traffic: Traffic = field(default_factory=Traffic)
    changes: list[Changed] = field(default_factory=list)
    pairs: list[tuple[Spell, Spell]] = field(default_factory=list)
    # The bundles of each epoch that was ever in use.
    states: dict[str, State] = field(default_factory=dict)
    before: Memory | None = None
    after: Memory | None = None


def main(
    changes: Annotated[int, typer.Option(min=1, help="Changes, made up to whole cycles of eight.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Workers.")] = 2,
    replicas: Annotated[int, typer.Option(min=1, help="Workers that hold each expert.")] = 1,
    routers: Annotated[int, typer.Option(min=1, help="Routers, which share the streams.")] = 1,
    pause: Annotated[float, typer.Option(min=0, help="Seconds between two changes.")] = 0.25,
    over_ray: Annotated[
        bool, typer.Option("--over-ray", help="`moesaic serve` starts the processes.")
    ] = False,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes swap_soak.json."""
    disable_progress_bar()
    cycles = 1 if quick else -(-changes // len(CYCLE))
    setup = Setup(
        options.DEMO_MODEL,
        workers=workers,
        replicas=replicas,
        routers=routers,
        controlled=True,
        settings={"dtype": "float32", **SMALL_CACHE},
    )
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bundles = dict(_bundles(Path(folder)))
        with (serve_over_ray if over_ray else serve)(setup) as site:
            run = asyncio.run(_Soak(site, bundles, pause).run(cycles))
        verdicts = _check(run, bundles)
    started = "started by `moesaic serve`" if over_ray else "started by hand"
    result = _conclude(run, verdicts, setup, started, pause, (load, os.getloadavg()[0]), out, quick)
    if faults := [figure.name for figure in result.figures if figure.key in _MUST_BE_ZERO and figure.value]:
        raise SystemExit(f"not as it must be: {', '.join(faults)}")


def _bundles(folder: Path) -> Iterator[tuple[str, NoisyBundle]]:
    for seed, (name, like, new) in enumerate(
        (("a", 0, False), ("b", 0, False), ("c", 0, False), ("m", 3, True), ("n", 6, True))
    ):
        yield name, write_noisy_bundle(folder / name, options.DEMO_MODEL, like, new=new, seed=seed)


class _Soak:
    """Streams and changes on a running site."""

    def __init__(self, site: Served, bundles: Mapping[str, NoisyBundle], pause_s: float) -> None:
        self._site = site
        self._bundles = bundles
        self._pause_s = pause_s
        self._run = Run()
        self._state: State = frozenset()

    async def run(self, cycles: int) -> Run:
        run = self._run
        async with controller_client(await find_controller(self._site.router)) as controller:
            for bundle in self._bundles.values():
                await controller.upload(bundle.bundle)
            async with self._streaming():
                await self._cycle(controller)
            run.before = await self._settled()
            run.traffic, run.changes = Traffic(), []
            async with self._streaming():
                for index in range(cycles):
                    changing = await self._cycle(controller)
                    start_s = time.perf_counter()
                    await asyncio.sleep(changing.seconds)
                    run.pairs.append((changing, Spell(start_s, time.perf_counter())))
                    progress(f"swap_soak: cycle {index + 1} of {cycles}, {changing.seconds:.1f} s")
            run.after = await self._settled(run.before.held)
        return run

    async def _cycle(self, controller: ControllerClient) -> Spell:
        start_s = time.perf_counter()
        for word, name in CYCLE:
            self._run.changes.append(await self._change(controller, word, name))
            await asyncio.sleep(self._pause_s)
        return Spell(start_s, time.perf_counter())

    async def _change(self, controller: ControllerClient, word: str, name: str) -> Changed:
        digest = b"" if word == "remove" else self._bundles[name].bundle.digest
        request = control_pb2.ChangeRequest(kind=KINDS[word], bundle=digest, name=name)
        done = await controller.carry_out(request)
        self._state = self._next(word, name)
        self._run.states.setdefault(done.previous_epoch, frozenset())
        if self._run.states.setdefault(done.epoch, self._state) != self._state:
            raise SystemExit(f"epoch {done.epoch} is two models")
        return Changed(word, done.committed_s, done.spread_s)

    def _next(self, word: str, name: str) -> State:
        if word == "remove":
            return self._state - {name}
        replaced = {other for verb, other in CYCLE if verb == "swap"} if word == "swap" else set()
        return self._state - replaced | {name}

    @asynccontextmanager
    async def _streaming(self) -> AsyncIterator[None]:
        """Streams on every router in turn, each of which asks again as soon as it is answered; the last answers are awaited."""
        ending = asyncio.Event()
        tasks = [
            asyncio.create_task(
                self._stream(self._site.routers[index % len(self._site.routers)], index, ending)
            )
            for index in range(STREAMS)
        ]
        try:
            yield
        finally:
            ending.set()
            await asyncio.gather(*tasks)

    async def _stream(self, router: str, first: int, ending: asyncio.Event) -> None:
        traffic, number = self._run.traffic, first
        async with Client(router, retries=False) as client:
            while not ending.is_set():
                answer = Answer()
                traffic.answers.append(answer)
                try:
                    async for token in client.generate(
                        PROMPTS[number % len(PROMPTS)],
                        max_tokens=ANSWER_TOKENS,
                        temperature=0.0,
                        ignore_eos=True,
                        return_weight_versions=True,
                    ):
                        answer.take(token)
                except MoesaicError as error:
                    traffic.answers.remove(answer)
                    traffic.failures.append(str(error))
                number += 1

    async def _settled(self, held: tuple[int, ...] | None = None) -> Memory:
        """The memory once workers hold what they held, or else once that no longer changes."""
        deadline_s, last, since_s = time.monotonic() + SETTLE_TIMEOUT_S, (), time.monotonic()
        while time.monotonic() < deadline_s:
            now = tuple([await _held_bytes(worker) for worker in self._site.workers])
            if now != last:
                last, since_s = now, time.monotonic()
            if now == held or (held is None and time.monotonic() - since_s > 5.0):
                break
            await asyncio.sleep(0.2)
        resident = {name: psutil.Process(pid).memory_info().rss for name, pid in self._site.processes.items()}
        return Memory(resident, last)


async def _held_bytes(worker: str) -> int:
    async with rpc.aio_channel(worker) as channel:
        answer = await expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest())
        return int(answer.weight_bytes)


def _check(run: Run, bundles: Mapping[str, NoisyBundle]) -> Verdicts:
    """Every answer against its epoch: one of them from end to end, and the tokens of transformers."""

    def is_whole(answer: Answer) -> bool:
        return len(answer.epochs) == 1 and answer.is_covered and answer.epochs <= run.states.keys()

    whole = [answer for answer in run.traffic.answers if is_whole(answer)]
    by_state: dict[State, Counter[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for answer in whole:
        state = run.states[next(iter(answer.epochs))]
        by_state.setdefault(state, Counter())[answer.prompt, tuple(answer.token_ids)] += 1
    num_wrong = num_ties = 0
    for state, answers in by_state.items():
        model = load_reference(options.DEMO_MODEL, (bundles[name] for name in sorted(state)))
        for (prompt, token_ids), count in answers.items():
            distance = distance_from_greedy(model, prompt, token_ids)
            num_ties += count * (0 < distance <= TIE)
            num_wrong += count * (distance > TIE)
    return Verdicts(
        len(whole),
        len(run.traffic.answers) - len(whole),
        num_wrong,
        num_ties,
        len({answer for answers in by_state.values() for answer in answers}),
        {"+".join(sorted(state)) or "base": answers.total() for state, answers in by_state.items()},
    )


_MUST_BE_ZERO = ("swap-soak-failed", "swap-soak-mixed", "swap-soak-wrong", "swap-soak-held")


def _conclude(
    run: Run,
    verdicts: Verdicts,
    setup: Setup,
    started: str,
    pause_s: float,
    load: tuple[float, float],
    out: Path,
    quick: bool,
) -> Result:
    assert run.before is not None and run.after is not None
    traffic, before, after = run.traffic, run.before, run.after
    growth = {name: (after.resident[name] - before.resident[name]) / MEGABYTE for name in before.resident}
    ratios = [traffic.tokens_per_s(changing) / traffic.tokens_per_s(calm) for changing, calm in run.pairs]
    stalls_ms = [
        1000 * (quantile(traffic.gaps_s(changing), 0.99) - quantile(traffic.gaps_s(calm), 0.99))
        for changing, calm in run.pairs
    ]
    committed = [change.committed_s for change in run.changes]
    number = len(run.changes)
    return conclude(
        "swap_soak",
        out,
        figures=[
            Figure(
                "swap-soak-failed", f"failed requests in {number} changes", len(traffic.failures), "requests"
            ),
            Figure("swap-soak-mixed", "answers of more than one version", verdicts.num_mixed, "answers"),
            Figure(
                "swap-soak-wrong",
                f"answers with another token than transformers, of {verdicts.num_checked}",
                verdicts.num_wrong,
                "answers",
            ),
            Figure("swap-soak-ties", f"of which within {TIE:g} of a tie", verdicts.num_ties, "answers"),
            Figure(
                "swap-soak-held", "bytes of experts more than before", sum(after.held) - sum(before.held), "B"
            ),
            Figure("swap-soak-rss", "growth of the process that grew most", max(growth.values()), "MB"),
            Figure(
                "swap-soak-speed",
                "tokens/s while experts change, over without, median",
                statistics.median(ratios),
                "x",
                min(ratios),
                max(ratios),
            ),
            Figure(
                "swap-soak-stall",
                "p99 of the gap between tokens, beyond that of the spell without, median",
                statistics.median(stalls_ms),
                "ms",
                min(stalls_ms),
                max(stalls_ms),
            ),
            Figure(
                "swap-soak-commit",
                "from the command until it is committed, median",
                statistics.median(committed),
                "s",
                min(committed),
                max(committed),
            ),
        ],
        tables=[
            _changes_table(run.changes),
            _spells_table(traffic, run.pairs),
            Table(
                "",
                ("process", "before MB", "after MB", "growth MB"),
                tuple(
                    (
                        name,
                        f"{size / MEGABYTE:,.1f}",
                        f"{after.resident[name] / MEGABYTE:,.1f}",
                        f"{growth[name]:+.1f}",
                    )
                    for name, size in before.resident.items()
                ),
            ),
        ],
        notes=[
            f"{setup.workers} workers, {setup.replicas} with each expert, {setup.routers} routers, "
            f"{started}, {STREAMS} streams, {pause_s:g} s between changes; every bundle has an expert for each of 4 layers",
            f"load average of the machine {load[0]:.0f} before, {load[1]:.0f} after",
        ],
        data={
            "answers by bundles": verdicts.num_by_state,
            "different answers": verdicts.num_different,
            "prompts": len(PROMPTS),
            "failures": traffic.failures[:20],
        },
        quick=quick,
    )


def _changes_table(changes: Sequence[Changed]) -> Table:
    def row(word: str, those: Sequence[Changed]) -> tuple[str, ...]:
        committed, spread = [each.committed_s for each in those], [each.spread_s for each in those]
        values = (
            quantile(committed, 0.5),
            quantile(committed, 0.99),
            quantile(spread, 0.5),
            quantile(spread, 0.99),
        )
        return (word, str(len(those)), *(f"{value:.2f}" for value in values))

    ordered = sorted(changes, key=lambda change: change.word)
    rows = tuple(row(word, list(those)) for word, those in groupby(ordered, key=lambda change: change.word))
    return Table(
        "", ("change", "number", "committed s, p50", "p99", "every router has it s, p50", "p99"), rows
    )


def _spells_table(traffic: Traffic, pairs: Sequence[tuple[Spell, Spell]]) -> Table:
    def row(name: str, spells: Sequence[Spell]) -> tuple[str, ...]:
        rate = statistics.median(map(traffic.tokens_per_s, spells))
        gaps = [gap for spell in spells for gap in traffic.gaps_s(spell)]
        values = (1000 * quantile(gaps, 0.5), 1000 * quantile(gaps, 0.99), 1000 * max(gaps))
        return (name, f"{rate:.1f}", *(f"{value:.0f}" for value in values))

    changing, calm = zip(*pairs, strict=True)
    return Table(
        "",
        ("spells", "tokens/s, median", "gap p50 ms", "p99 ms", "longest ms"),
        (row("while experts change", changing), row("without", calm)),
    )


if __name__ == "__main__":
    typer.run(main)

"""A fault under a steady load: turns without and with faults, one after another, and what came of both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cluster.drill.answers import Answer, Tally
from cluster.drill.faults import Act, Fault, Injection
from cluster.drill.injector import Strike
from cluster.drill.lag import watched_lag
from cluster.drill.living import Living
from cluster.drill.load import Load
from cluster.drill.quarantine import watched_calls
from cluster.drill.report import Mark, Picture, UnderLoad
from cluster.drill.residue import Residue, measure
from cluster.drill.rig import Rig, sleep_until
from cluster.drill.schedule import draw_injections, turn_lengths_s
from cluster.drill.timeline import (
    Span,
    Spread,
    longest_pauses_s,
    pauses_within_s,
    rate_over_time,
    rate_within,
    values_within,
)
from cluster.observation.activity import Activity, activity_between
from cluster.observation.observer import Observation
from moesaic.errors import FailedPrecondition, MoesaicError

# The load runs for so long before anything is counted.
WARM_UP_S = 3.0
# How long after a fault a pause still counts as its own.
TAIL_S = 1.0
PICTURE_STEP_S = 0.5

# Injects, and returns when the cluster is whole again.
Inject = Callable[[Injection, Living], Awaitable[Strike]]


@dataclass(slots=True)
class Turns:
    """What happened, as it happens."""

    controls: list[Span] = field(default_factory=list)
    faulty: list[Span] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    # The windows of the strikes, and as long ones at the same places of the control.
    windows: list[Span] = field(default_factory=list)
    control_windows: list[Span] = field(default_factory=list)
    control_activities: list[Activity] = field(default_factory=list)
    activities: list[Activity] = field(default_factory=list)
    # For how long each poisoned worker was asked.
    asked_s: list[float] = field(default_factory=list)
    poisoned_calls: int = 0
    before: Residue | None = None
    after: Residue | None = None

    def add(self, strikes: Sequence[Strike], faulty: Span, control: Span) -> None:
        self.faulty.append(faulty)
        self.strikes += strikes
        for strike in strikes:
            end_s = strike.whole_s if strike.whole_s is not None else faulty.end_s
            window = Span(strike.start_s, end_s + TAIL_S)
            self.windows.append(window)
            self.control_windows.append(_within(window.shifted(control.start_s - faulty.start_s), control))


class LoadedCase:
    """One fault on one cluster."""

    def __init__(self, rig: Rig, fault: Fault, inject: Inject) -> None:
        self._rig = rig
        self._fault = fault
        self._inject_one = inject
        self.turns = Turns()

    async def run(self) -> UnderLoad:
        """Raises FailedPrecondition where the cluster has nobody whom the fault could hit."""
        rig = self._rig
        start_s = rig.clock()
        load = Load(rig.api.send, rig.requests, rig.plan.streams, rig.clock)
        async with watched_lag(rig.clock) as late_s, _running(load):
            await asyncio.sleep(WARM_UP_S)
            self.turns.before = await self._residue(rig.living)
            for turn, seconds in enumerate(turn_lengths_s(self._fault, rig.plan.seconds)):
                if rig.site.has_ended:
                    break
                control = await self._control(seconds)
                await self._faulty(turn, seconds, control)
            if not rig.site.has_ended:
                self.turns.after = await self._residue(await rig.cluster.look())
        return self._summary(load.answers, Span(start_s, rig.clock()), late_s)

    async def _control(self, seconds: float) -> Span:
        start_s, before = self._rig.clock(), await self._observe()
        self._rig.say(f"{self._fault}: control, {seconds:.0f} s")
        await sleep_until(start_s + seconds, self._rig.clock)
        self._note(self.turns.control_activities, before, await self._observe())
        span = Span(start_s, start_s + seconds)
        self.turns.controls.append(span)
        return span

    async def _faulty(self, turn: int, seconds: float, control: Span) -> None:
        """Runs the injections of a turn one after another, each once the cluster is whole again."""
        rig = self._rig
        injections = draw_injections(self._fault, turn, seconds, rig.plan.seed, rig.living.targets)
        if not injections:
            raise FailedPrecondition(
                f"fault: this cluster has nobody whom {self._fault} could hit", field="fault"
            )
        start_s, before = rig.clock(), await self._observe()
        strikes: list[Strike] = []
        for injection in injections:
            due_s = start_s + injection.at_s
            if rig.clock() > start_s + seconds or rig.site.has_ended:
                break
            await sleep_until(due_s, rig.clock)
            living = await rig.injector.wait_whole()
            if living is None:
                break
            strike = await self._inject(injection, living)
            strikes.append(strike)
            rig.say(f"{self._fault}: {_told(strike)}")
        await sleep_until(start_s + seconds, rig.clock)
        self._note(self.turns.activities, before, await self._observe())
        self.turns.add(strikes, Span(start_s, rig.clock()), control)

    async def _inject(self, injection: Injection, living: Living) -> Strike:
        """Of a poisoned worker it is counted, too, for how long it was asked while it was poisoned."""
        if injection.act is not Act.POISON:
            return await self._inject_one(injection, living)
        async with watched_calls(self._rig.cluster.observer, injection.targets[0], self._rig.clock) as watch:
            strike = await self._inject_one(injection, living)
        self.turns.asked_s.append(watch.asked_s(until_s=strike.healed_s))
        self.turns.poisoned_calls += watch.calls(until_s=strike.healed_s)
        return strike

    def _summary(
        self, answers: Sequence[Answer], whole: Span, late_s: Sequence[tuple[float, float]]
    ) -> UnderLoad:
        turns, rig = self.turns, self._rig
        records = [answer.record for answer in answers]
        disturbed = [*turns.faulty, *turns.windows]
        faulty = [answer for answer in answers if _meets(answer, disturbed)]
        healthy = [answer for answer in answers if not _meets(answer, disturbed)]
        return UnderLoad(
            faults=len(turns.strikes),
            tally=Tally.of(faulty, rig.references),
            control=Tally.of(healthy, rig.references),
            pauses=Spread.of(longest_pauses_s(records, turns.windows)),
            control_pauses=Spread.of(longest_pauses_s(records, turns.control_windows)),
            token_gaps=Spread.of(pauses_within_s(records, turns.faulty)),
            control_token_gaps=Spread.of(pauses_within_s(records, turns.controls)),
            tokens_per_s=rate_within(records, turns.faulty),
            control_tokens_per_s=rate_within(records, turns.controls),
            recovery=Spread.of(
                strike.recovery_s for strike in turns.strikes if strike.recovery_s is not None
            ),
            poisoned_calls=turns.poisoned_calls if turns.asked_s else None,
            lateness=Spread.of(values_within(late_s, turns.faulty)),
            control_lateness=Spread.of(values_within(late_s, turns.controls)),
            picture=_picture(rate_over_time(records, whole, PICTURE_STEP_S), whole, turns),
        )

    async def _observe(self) -> Observation | None:
        try:
            return await self._rig.cluster.observer.observe()
        except MoesaicError:
            return None

    def _note(
        self, activities: list[Activity], before: Observation | None, after: Observation | None
    ) -> None:
        if before is not None and after is not None:
            activities.append(activity_between(before, after))

    async def _residue(self, living: Living | None) -> Residue | None:
        """What the cluster holds, asked of a thread: it takes a while, in which tokens arrive. Of a soak alone."""
        if self._fault is not Fault.ALL or living is None:
            return None
        return await asyncio.to_thread(lambda: measure(self._rig.site.pids or living.pids.values()))


def calls_per_step(activities: Iterable[Activity]) -> float | None:
    """None without a step."""
    counted = list(activities)
    steps = sum(activity.steps for activity in counted)
    return sum(activity.calls for activity in counted) / steps if steps else None


@contextlib.asynccontextmanager
async def _running(load: Load) -> AsyncIterator[None]:
    """The load until the context ends; then it lets its requests end, unless something went wrong."""
    running = asyncio.create_task(load.run())
    try:
        yield
        load.stop()
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _within(window: Span, outer: Span) -> Span:
    """The window, moved into the outer span as far as it fits."""
    late_s = max(0.0, window.end_s - outer.end_s)
    return Span(max(outer.start_s, window.start_s - late_s), window.end_s - late_s)


def _meets(answer: Answer, spans: Iterable[Span]) -> bool:
    return any(span.meets(answer.record.due_s, answer.record.end_s) for span in spans)


def _picture(rates: tuple[float, ...], whole: Span, turns: Turns) -> Picture:
    zero_s = whole.start_s
    return Picture(
        step_s=PICTURE_STEP_S,
        rates=rates,
        turns=tuple((span.start_s - zero_s, span.end_s - zero_s) for span in turns.faulty),
        marks=tuple(
            Mark(
                strike.injection.title,
                strike.start_s - zero_s,
                strike.healed_s - zero_s,
                None if strike.whole_s is None else strike.whole_s - zero_s,
            )
            for strike in turns.strikes
        ),
    )


def _told(strike: Strike) -> str:
    recovery_s = strike.recovery_s
    return f"{strike.injection.title}: " + (
        "NOT whole again" if recovery_s is None else f"whole after {recovery_s:.1f} s"
    )

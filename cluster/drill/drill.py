"""`moesaic drill`: case by case, each on a cluster of its own unless one that runs is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cluster.bench.bench import Outputs
from cluster.bench.machine import describe_machine
from cluster.bench.other_load import QUIET_SHARE, share_used_by_others
from cluster.checkpoints.model_source import DEMO_MODEL
from cluster.drill.cancelling import run_cancels
from cluster.drill.changing import Changing, changing_experts
from cluster.drill.contract import CONTRACT, Figures, broken
from cluster.drill.experts import Outcome
from cluster.drill.faults import Fault, Injection
from cluster.drill.injector import Strike
from cluster.drill.living import Living
from cluster.drill.network_cut import check_can_cut
from cluster.drill.overloading import run_overload
from cluster.drill.report import Cancels, Case, DrillReport, Overload, UnderLoad, print_report
from cluster.drill.residue import Residue
from cluster.drill.rig import PROMPTS, PROMPTS_OF_EPOCHS, DrillPlan, Rig, Say, rig_of
from cluster.drill.site import Site, hand_made_site, running_site, served_site
from cluster.drill.under_load import LoadedCase, Turns, calls_per_step
from cluster.launch.serve import CheckedModel, check_model
from moesaic.errors import FailedPrecondition, InvalidArgument
from moesaic.settings import Settings
from moesaic.stop_signals import StopSignals

MIN_MINUTES, MAX_MINUTES = 0.1, 24 * 60.0
# A lost router is another matter where a second one is left.
ROUTERS = {Fault.ROUTER: (1, 2)}


def parse_faults(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Parses names, each alone or several with commas between them. Raises InvalidArgument."""
    try:
        faults = [Fault(name.strip()) for text in texts for name in text.split(",")]
    except ValueError as error:
        raise InvalidArgument(f"fault: must be one of {', '.join(Fault)}", field="fault") from error
    return tuple(dict.fromkeys(faults))


def make_plan(minutes: float, seed: int, streams: int) -> DrillPlan:
    """Raises InvalidArgument."""
    if not MIN_MINUTES <= minutes <= MAX_MINUTES:
        raise InvalidArgument(f"minutes: must be from {MIN_MINUTES} to {MAX_MINUTES:g}", field="minutes")
    return DrillPlan(60 * minutes, seed, streams)


async def drill_own_clusters(
    settings: Settings, faults: Sequence[Fault], plan: DrillPlan, outputs: Outputs
) -> bool:
    """Starts a cluster for each case. Returns whether the contract holds. Raises MoesaicError."""
    outputs.check()
    if Fault.PARTITION in faults:
        _check_partition(settings)
    model = check_model(settings)
    shapes: dict[_Shape, list[Fault]] = {}
    for fault in faults:
        for routers in ROUTERS.get(fault, (settings.cluster.routers,)):
            shapes.setdefault(_Shape(fault is Fault.NAN, routers), []).append(fault)
    return await _drill(
        [(partial(_own_site, shape, settings, model), drilled) for shape, drilled in shapes.items()],
        plan,
        outputs,
    )


async def drill_running_cluster(
    url: str, grpc: str, faults: Sequence[Fault], plan: DrillPlan, outputs: Outputs
) -> bool:
    """Drills a cluster that runs, with faults whose processes are on this host. Raises MoesaicError."""
    outputs.check()
    if Fault.NAN in faults:
        raise InvalidArgument(
            "fault: nan needs a worker that can be poisoned: let the drill start a cluster", field="fault"
        )
    if Fault.PARTITION in faults:
        check_can_cut()
    return await _drill([(partial(running_site, url, grpc), faults)], plan, outputs)


def _check_partition(settings: Settings) -> None:
    """Raises FailedPrecondition."""
    if settings.cluster.address is None:
        raise FailedPrecondition(
            "fault: partition needs a cluster of several hosts: give --address, or --grpc and --http of one that runs",
            field="fault",
        )
    check_can_cut()


class _Shape(NamedTuple):
    """What a cluster of the drill's own consists of; faults that need the same one share it."""

    by_hand: bool
    routers: int


def _own_site(shape: _Shape, settings: Settings, model: CheckedModel) -> AbstractAsyncContextManager[Site]:
    if shape.by_hand:
        return hand_made_site(settings, model)
    clustered = settings.cluster.model_copy(update={"routers": shape.routers})
    return served_site(settings.model_copy(update={"cluster": clustered}), model)


MakeSite = Callable[[], AbstractAsyncContextManager[Site]]


async def _drill(
    sites: Sequence[tuple[MakeSite, Sequence[Fault]]], plan: DrillPlan, outputs: Outputs
) -> bool:
    """Delivers the cases that have ended, also when the drill is stopped or fails."""
    console = Console(stderr=True, highlight=False)
    used_by_others = await share_used_by_others()
    if used_by_others > QUIET_SHARE:
        console.print(
            f"warning: other programs use {used_by_others:.0%} of this machine's CPU time: pauses will be too long",
            style="yellow",
            soft_wrap=True,
        )
    cases: list[Case] = []

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    def report() -> DrillReport:
        return DrillReport(
            seed=plan.seed,
            minutes=plan.seconds / 60,
            streams=plan.streams,
            machine=describe_machine(),
            used_by_others=used_by_others,
            cases=tuple(cases),
        )

    try:
        with StopSignals() as signals:
            for make_site, faults in sites:
                await signals.unless_stopped(_drill_site(make_site, faults, plan, say, cases))
    finally:
        if cases:
            _deliver(report(), outputs)
    return report().holds


async def _drill_site(
    make_site: MakeSite, faults: Sequence[Fault], plan: DrillPlan, say: Say, cases: list[Case]
) -> None:
    """Adds a case for every fault. A cluster that a fault has broken is ended, and the next fault gets another one."""
    waiting = list(faults)
    while waiting:
        say(f"starting a cluster for {', '.join(waiting)}")
        async with make_site() as site:
            is_well = True
            while waiting and is_well:
                case = await _case(waiting.pop(0), site, plan, say)
                cases.append(case)
                is_well = not (site.children and (site.has_ended or case.figures.not_recovered))
        if site.left_behind:
            cases[-1] = _judged(replace(case, figures=replace(case.figures, left_behind=site.left_behind)))


async def _case(fault: Fault, site: Site, plan: DrillPlan, say: Say) -> Case:
    num_prompts = PROMPTS_OF_EPOCHS if fault in (Fault.SWAP, Fault.ALL) else PROMPTS
    async with rig_of(site, plan, say, num_prompts=num_prompts) as rig:
        case = await _measure(fault, rig)
    if site.has_ended:
        case = replace(case, notes=(f"the server ended by itself: {site.last_words}",))
    case = _judged(case)
    say(f"{fault}: {'; '.join(case.broken) or 'the contract holds'}")
    return case


def _judged(case: Case) -> Case:
    return replace(case, broken=broken(CONTRACT[case.fault], case.figures))


async def _measure(fault: Fault, rig: Rig) -> Case:
    match fault:
        case Fault.CANCEL:
            cancels = await run_cancels(rig)
            return _new_case(fault, rig, _of_cancels(cancels), cancels=cancels)
        case Fault.OVERLOAD:
            overload = await run_overload(rig)
            return _new_case(fault, rig, _of_overload(overload), overload=overload)
        case Fault.SWAP:
            async with changing_experts(rig) as changing:
                return await _measure_load(fault, rig, changing)
        case Fault.ALL if rig.site.model == DEMO_MODEL.name:
            async with changing_experts(rig) as changing:
                return await _measure_load(fault, rig, changing)
        case _:
            return await _measure_load(fault, rig)


async def _inject_alone(rig: Rig, injection: Injection, living: Living) -> Strike:
    """Where no experts change nothing is in the middle of a change."""
    return await rig.injector.inject(replace(injection, stage=None), living)


async def _measure_load(fault: Fault, rig: Rig, changing: Changing | None = None) -> Case:
    """`changing`: where experts change, too."""
    if changing is None:
        loaded = LoadedCase(rig, fault, partial(_inject_alone, rig))
    else:
        loaded = LoadedCase(changing.rig, fault, changing.inject)
    under_load = await loaded.run()
    turns = loaded.turns
    changes = None if changing is None else dict(changing.outcomes)
    figures = _of_load(
        under_load,
        turns,
        growth_ratio=_growth(turns.before, turns.after),
        torn=changes.get(Outcome.TORN, 0) if changes else 0,
    )
    return _new_case(
        fault,
        rig,
        figures,
        under_load=under_load,
        before=turns.before,
        after=turns.after,
        changes=changes,
    )


def _new_case(
    fault: Fault,
    rig: Rig,
    figures: Figures,
    *,
    under_load: UnderLoad | None = None,
    cancels: Cancels | None = None,
    overload: Overload | None = None,
    before: Residue | None = None,
    after: Residue | None = None,
    changes: Mapping[Outcome, int] | None = None,
) -> Case:
    routers = len(rig.living.targets.routers)
    return Case(
        title=f"{fault} of {routers}" if fault in ROUTERS else fault,
        fault=fault,
        cluster=rig.description,
        model=rig.site.model,
        figures=figures,
        broken=(),
        under_load=under_load,
        cancels=cancels,
        overload=overload,
        before=before,
        after=after,
        changes=changes,
    )


def _of_load(load: UnderLoad, turns: Turns, *, growth_ratio: float | None = None, torn: int = 0) -> Figures:
    return Figures(
        lost=load.tally.lost,
        wrong_tokens=load.tally.wrong_tokens,
        mixed=load.tally.mixed,
        pause_p99_s=load.pauses.p99_s,
        control_pause_p99_s=load.control_pauses.p99_s,
        token_p99_ratio=_ratio(load.token_gaps.p99_s, load.control_token_gaps.p99_s),
        calls_ratio=_ratio(calls_per_step(turns.activities), calls_per_step(turns.control_activities)),
        recovery_s=load.recovery.max_s,
        not_recovered=sum(strike.whole_s is None for strike in turns.strikes),
        quarantine_s=max(turns.asked_s, default=None),
        growth_ratio=growth_ratio,
        torn=torn,
    )


def _of_cancels(cancels: Cancels) -> Figures:
    tally = cancels.tally
    return Figures(
        lost=tally.lost,
        wrong_tokens=tally.wrong_tokens,
        mixed=tally.mixed,
        stop_s=cancels.stop.p99_s,
        leaked_blocks=cancels.leaked_blocks,
    )


def _of_overload(overload: Overload) -> Figures:
    tally = overload.tally
    return Figures(
        lost=tally.lost,
        wrong_tokens=tally.wrong_tokens,
        mixed=tally.mixed,
        refusal_s=overload.refusal.p99_s,
        refusals_without_retry_after=overload.refusals_without_retry_after,
        goodput_ratio=overload.goodput_share,
    )


def _growth(before: Residue | None, after: Residue | None) -> float | None:
    return max(after.growth(before).values()) if before is not None and after is not None else None


def _ratio(value: float | None, control: float | None) -> float | None:
    return value / control if value is not None and control else None


def _draw(report: DrillReport, file: Path) -> None:
    from cluster.drill.chart import draw_chart

    draw_chart(report, file)


def _deliver(report: DrillReport, outputs: Outputs) -> None:
    """Prints, saves and draws the report."""
    content = asdict(report) | {"holds": report.holds}
    outputs.deliver(content, partial(_draw, report), partial(print_report, report))

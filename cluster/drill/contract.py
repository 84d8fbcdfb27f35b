"""What Moesaic promises for each fault, as data, and what of it some figures break. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.drill.faults import Fault


@dataclass(frozen=True, slots=True)
class Bound:
    """What a fault may cost. A bound that is None does not apply; times are seconds."""

    lost: int | None = 0
    wrong_tokens: int = 0
    mixed: int = 0
    # How far the p99 of the longest pauses may lie above the control's.
    pause_above_s: float | None = None
    # The p99 of all pauses between tokens, as a multiple of the control's.
    token_p99_ratio: float | None = None
    # Calls to workers a step, as a multiple of the control's.
    calls_ratio: float | None = None
    # Until every process is READY again, at most.
    recovery_s: float | None = None
    # Until a worker that answers wrongly is asked no more.
    quarantine_s: float | None = None
    # After a client has left: until its work has stopped, the p99.
    stop_s: float | None = None
    leaked_blocks: int | None = None
    # Under overload: the p99 of a refusal, and the tokens of whole answers over the most that is possible.
    refusal_s: float | None = None
    goodput_ratio: float | None = None
    # From before to after: what all processes hold, as a multiple.
    growth_ratio: float | None = None


CONTRACT: Mapping[Fault, Bound] = {
    Fault.KILL: Bound(pause_above_s=0.25),
    Fault.FREEZE: Bound(pause_above_s=0.5),
    Fault.SLOW: Bound(token_p99_ratio=2.0, calls_ratio=1.05),
    Fault.PAIR: Bound(recovery_s=5.0),
    Fault.PARTITION: Bound(pause_above_s=1.0),
    Fault.NAN: Bound(quarantine_s=1.0),
    Fault.ROUTER: Bound(recovery_s=10.0),
    # "None": no pause above what a healthy run has by chance.
    Fault.CONTROLLER: Bound(pause_above_s=0.1),
    Fault.HEAD: Bound(pause_above_s=0.1),
    # The worst of the faults that it has.
    Fault.SWAP: Bound(pause_above_s=0.5),
    Fault.CANCEL: Bound(stop_s=0.1, leaked_blocks=0),
    Fault.OVERLOAD: Bound(refusal_s=0.05, goodput_ratio=0.9),
    Fault.ALL: Bound(growth_ratio=1.1),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one fault, in the terms of its bound; None where it was not measured."""

    lost: int = 0
    wrong_tokens: int = 0
    mixed: int = 0
    pause_p99_s: float | None = None
    control_pause_p99_s: float | None = None
    token_p99_ratio: float | None = None
    calls_ratio: float | None = None
    recovery_s: float | None = None
    quarantine_s: float | None = None
    stop_s: float | None = None
    leaked_blocks: int | None = None
    refusal_s: float | None = None
    refusals_without_retry_after: int = 0
    goodput_ratio: float | None = None
    growth_ratio: float | None = None
    # Changes of experts after which neither the old nor the new epoch was the model.
    torn: int = 0
    # Faults whose processes were not READY again in time.
    not_recovered: int = 0
    # Processes that had to be killed at the end.
    left_behind: int = 0


def broken(bound: Bound, figures: Figures) -> tuple[str, ...]:
    """What of the contract does not hold, a sentence each."""
    return tuple(_broken(bound, figures))


def _broken(bound: Bound, figures: Figures) -> Iterator[str]:
    if bound.lost is not None and figures.lost > bound.lost:
        yield f"{figures.lost} requests lost"
    if figures.wrong_tokens > bound.wrong_tokens:
        yield f"{figures.wrong_tokens} wrong tokens"
    if figures.mixed > bound.mixed:
        yield f"{figures.mixed} answers of mixed versions"
    if figures.torn:
        yield f"{figures.torn} changes left neither the old epoch nor the new one"
    if figures.not_recovered:
        yield f"not whole again after {figures.not_recovered} faults"
    if figures.refusals_without_retry_after:
        yield f"{figures.refusals_without_retry_after} refusals without Retry-After"
    if figures.left_behind:
        yield f"{figures.left_behind} processes left behind"
    yield from _broken_pause(bound, figures)
    yield from _above("between tokens p99 {} x the control's", figures.token_p99_ratio, bound.token_p99_ratio)
    yield from _above("calls a step {} x the control's", figures.calls_ratio, bound.calls_ratio)
    yield from _above("whole again after {} s", figures.recovery_s, bound.recovery_s)
    yield from _above(
        "asked for {} s although its answers were wrong", figures.quarantine_s, bound.quarantine_s
    )
    yield from _above("work stopped {} s after the client had left", figures.stop_s, bound.stop_s)
    yield from _above("{} KV blocks leaked", figures.leaked_blocks, bound.leaked_blocks)
    yield from _above("refusal p99 {} s", figures.refusal_s, bound.refusal_s)
    yield from _above("resources grew to {} x", figures.growth_ratio, bound.growth_ratio)
    if bound.goodput_ratio is not None and (figures.goodput_ratio or 0.0) < bound.goodput_ratio:
        yield f"goodput {figures.goodput_ratio or 0.0:.2f} of the peak, at least {bound.goodput_ratio:g} promised"


def _broken_pause(bound: Bound, figures: Figures) -> Iterator[str]:
    pause_s, control_s = figures.pause_p99_s, figures.control_pause_p99_s
    if bound.pause_above_s is None or pause_s is None or control_s is None:
        return
    if pause_s - control_s > bound.pause_above_s:
        yield (
            f"longest pause p99 {pause_s:.2f} s, {pause_s - control_s:.2f} s above the control's, "
            f"{bound.pause_above_s:g} s promised"
        )


def _above(sentence: str, value: float | None, most: float | None) -> Iterator[str]:
    if value is not None and most is not None and value > most:
        yield f"{sentence.format(f'{value:.3g}')}, {most:g} promised"

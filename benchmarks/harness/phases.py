"""A router's own account of its time; tables of it, and the points that the scaling model is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.result import Table
from harness.turns import Turns
from moesaic.client.router_stats import RouterStats

# The parts of the router's wait for a layer in which its worker does not compute.
OVERHEAD = ("wire", "worker decode", "worker queue", "worker encode")
_WAITING = (*OVERHEAD, "worker compute")
_OWN_SHARE = ("encode", "decode", "combine")


@dataclass(frozen=True, slots=True)
class Phases:
    """What a router did between two moments: the seconds of each phase, its steps and its traffic."""

    seconds: Mapping[str, float]
    steps: int
    sent_bytes: int
    received_bytes: int
    calls: int
    tokens: int

    def per_step_s(self, *names: str) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names) / max(1, self.steps)

    @property
    def step_s(self) -> float:
        return self.per_step_s(*self.seconds)

    @property
    def overhead_s(self) -> float:
        """A step's wait for its layers minus the time that the slowest worker computes."""
        return self.per_step_s(*OVERHEAD)

    @property
    def compute_s(self) -> float:
        return self.per_step_s("worker compute")

    @property
    def router_s(self) -> float:
        """The time of a step in which the router does not wait for a worker."""
        return self.per_step_s(*(name for name in self.seconds if name not in _WAITING))

    @property
    def bytes_per_token(self) -> float:
        return (self.sent_bytes + self.received_bytes) / max(1, self.tokens)


def phases_between(before: RouterStats, after: RouterStats) -> Phases:
    earlier = {phase.phase: phase.seconds for phase in before.phases}
    traffic = [
        (new.sent_bytes - old.sent_bytes, new.received_bytes - old.received_bytes, new.calls - old.calls)
        for old, new in zip(before.workers, after.workers, strict=True)
    ]
    return Phases(
        {phase.phase: phase.seconds - earlier[phase.phase] for phase in after.phases},
        steps=after.steps - before.steps,
        sent_bytes=sum(sent for sent, _, _ in traffic),
        received_bytes=sum(received for _, received, _ in traffic),
        calls=sum(calls for _, _, calls in traffic),
        tokens=after.generated_tokens - before.generated_tokens,
    )


class Measured(Protocol):
    """A measurement with the router's account of it."""

    @property
    def tokens_per_s(self) -> float: ...

    @property
    def phases(self) -> Phases: ...


def layer_table(
    by_batch: Mapping[int, Turns[Any]],
    sides: Sequence[str],
    layers: int,
    *,
    title: str,
    per_s: float,
    digits: int,
) -> Table:
    """The phases of one layer, in units of which a second has `per_s`."""

    def row(turns: Turns[Measured], batch: int, side: str) -> tuple[str, ...]:
        def cell(*phases: str) -> str:
            value = turns.median(side, lambda measured: per_s * measured.phases.per_step_s(*phases) / layers)
            return f"{value:.{digits}f}"

        parts = (*OVERHEAD, "worker compute")
        return (f"{batch}, {side}", cell(*OVERHEAD), *map(cell, parts), cell(*_OWN_SHARE))

    return Table(
        title,
        ("batch, transport", "overhead", *OVERHEAD, "worker compute", "router's encode + decode + combine"),
        tuple(row(turns, batch, side) for batch, turns in by_batch.items() for side in sides),
    )


def phase_table(turns: Turns[Any], batch: int, sides: Iterable[str], phases: Iterable[str]) -> Table:
    """All phases of a step, side by side."""
    sides = tuple(sides)

    def ms(side: str, of: Callable[[Phases], float]) -> float:
        return turns.median(side, lambda measured: 1000 * of(measured.phases))

    def row(phase: str) -> tuple[str, ...]:
        return (phase, *(f"{ms(side, lambda each: each.per_step_s(phase)):.2f}" for side in sides))

    sums = (f"{ms(side, lambda each: each.step_s):.1f}" for side in sides)
    return Table(f"ms a step, batch {batch}", ("phase", *sides), (*map(row, phases), ("all", *sums)))


def decode_point(turns: Turns[Any], side: str, batch: int, experts: str, workers: int) -> dict[str, Any]:
    """One side's steps of decoding, all of which are alike, as the scaling model is fitted to them."""

    def median(of: Callable[[Phases], float]) -> float:
        return turns.median(side, lambda measured: of(measured.phases))

    return {
        "experts": experts,
        "workers": workers,
        "rows": batch,
        "step_s": turns.median(side, lambda measured: batch / measured.tokens_per_s),
        "compute_s": median(lambda phases: phases.compute_s),
        "overhead_s": median(lambda phases: phases.overhead_s),
        "router_s": median(lambda phases: phases.router_s),
        "bytes": median(lambda phases: phases.bytes_per_token) * batch,
    }

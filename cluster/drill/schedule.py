"""Which faults come when, drawn from a seed: the same seed and the same processes give the same drill. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from cluster.drill.faults import Act, Direction, Fault, Injection, Stage, Targets

# A share of the turn at its end, in which nothing begins: what a fault does has to show while it is counted.
QUIET_END = 0.1
# The longest turn. A longer drill is cut into several, and a control stands before each.
MAX_TURN_S = 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between the end of one fault and the next, and how long one lasts; drawn evenly between both bounds."""

    rest_s: tuple[float, float]
    lasts_s: tuple[float, float] = (0.0, 0.0)
    max_turn_s: float = MAX_TURN_S


PACES: Mapping[Fault, Pace] = {
    Fault.KILL: Pace((2.0, 5.0)),
    Fault.FREEZE: Pace((2.0, 4.0), (1.0, 30.0), max_turn_s=120.0),
    Fault.SLOW: Pace((1.0, 2.0), (300.0, 300.0), max_turn_s=310.0),
    Fault.PAIR: Pace((5.0, 8.0)),
    Fault.PARTITION: Pace((4.0, 6.0), (20.0, 20.0), max_turn_s=120.0),
    Fault.NAN: Pace((3.0, 5.0), (5.0, 10.0)),
    Fault.ROUTER: Pace((5.0, 8.0)),
    Fault.CONTROLLER: Pace((5.0, 8.0), (5.0, 25.0), max_turn_s=120.0),
    # One a turn: everything that could start anything is gone for a minute.
    Fault.HEAD: Pace((3.0, 4.5), (60.0, 60.0), max_turn_s=72.0),
    Fault.SWAP: Pace((1.0, 3.0), (1.0, 5.0)),
    Fault.ALL: Pace((3.0, 6.0), (1.0, 15.0), max_turn_s=120.0),
}


def turn_lengths_s(fault: Fault, seconds: float) -> tuple[float, ...]:
    """The turns of equal length into which `seconds` of a fault are cut."""
    turns = max(1, round(seconds / PACES[fault].max_turn_s))
    return (seconds / turns,) * turns


def draw_injections(
    fault: Fault, turn: int, seconds: float, seed: int, targets: Targets
) -> tuple[Injection, ...]:
    """The injections of one turn. Those that last end before the turn does.

    The times suppose that the cluster is whole again at once; who injects waits until it is.
    """
    random = Random(f"{seed} {fault} {turn}")
    pace, draw = PACES[fault], _DRAWS[fault]
    injections: list[Injection] = []
    now_s, end_s = random.uniform(*pace.rest_s), (1 - QUIET_END) * seconds
    while now_s < end_s:
        lasts_s = min(random.uniform(*pace.lasts_s), end_s - now_s)
        injection = draw(random, targets, now_s, lasts_s)
        if injection is None:
            break
        injections.append(injection)
        now_s += injection.lasts_s + random.uniform(*pace.rest_s)
    return tuple(injections)


# Draws one injection at a time for so long; None where there is nobody to hit.
_Draw = Callable[[Random, Targets, float, float], Injection | None]


def _kill(random: Random, targets: Targets, at_s: float, _: float) -> Injection | None:
    return _of_one(random, tuple(targets.workers), Act.KILL, at_s)


def _freeze(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    return _of_one(random, tuple(targets.workers), Act.FREEZE, at_s, lasts_s)


def _slow(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    return _of_one(random, tuple(targets.workers), Act.SLOW, at_s, lasts_s)


def _pair(random: Random, targets: Targets, at_s: float, _: float) -> Injection | None:
    """Every worker that holds an expert, so that nobody can compute it."""
    experts = sorted({expert for held in targets.workers.values() for expert in held})
    if not experts:
        return None
    expert = random.choice(experts)
    holders = sorted(name for name, held in targets.workers.items() if expert in held)
    return Injection(at_s, Act.KILL, tuple(holders))


def _partition(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    if not targets.hosts:
        return None
    direction = random.choice(list(Direction))
    return Injection(at_s, Act.CUT, (random.choice(targets.hosts),), lasts_s, direction)


def _poison(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    return _of_one(random, targets.poisonable, Act.POISON, at_s, lasts_s)


def _router(random: Random, targets: Targets, at_s: float, _: float) -> Injection | None:
    return _of_one(random, targets.routers, Act.KILL, at_s)


def _control(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    if random.random() < 0.5:
        return _of_one(random, targets.control, Act.KILL, at_s)
    return _of_one(random, targets.control, Act.FREEZE, at_s, lasts_s)


def _head(_: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    return Injection(at_s, Act.DOWN, targets.control, lasts_s) if targets.control else None


def _amid_change(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    """A worker killed or frozen, or a part of control killed."""
    killed_control = _of_one(random, targets.control, Act.KILL, at_s)
    drawn = (_kill(random, targets, at_s, 0.0), _freeze(random, targets, at_s, lasts_s), killed_control)
    possible = [injection for injection in drawn if injection is not None]
    return replace(random.choice(possible), stage=random.choice(list(Stage))) if possible else None


def _any(random: Random, targets: Targets, at_s: float, lasts_s: float) -> Injection | None:
    draws: tuple[_Draw, ...] = (_kill, _freeze, _slow, _pair, _router, _control, _amid_change)
    return random.choice(draws)(random, targets, at_s, lasts_s)


_DRAWS: Mapping[Fault, _Draw] = {
    Fault.KILL: _kill,
    Fault.FREEZE: _freeze,
    Fault.SLOW: _slow,
    Fault.PAIR: _pair,
    Fault.PARTITION: _partition,
    Fault.NAN: _poison,
    Fault.ROUTER: _router,
    Fault.CONTROLLER: _control,
    Fault.HEAD: _head,
    Fault.SWAP: _amid_change,
    Fault.ALL: _any,
}


def _of_one(
    random: Random, names: tuple[str, ...], act: Act, at_s: float, lasts_s: float = 0.0
) -> Injection | None:
    return Injection(at_s, act, (random.choice(sorted(names)),), lasts_s) if names else None


@dataclass(frozen=True, slots=True)
class Cancel:
    """One client that goes away: it starts after `start_s` and leaves after `leave_s`, both from the round's start."""

    start_s: float
    leave_s: float


def draw_cancels(rounds: int, streams: int, seed: int, longest_s: float) -> Iterator[tuple[Cancel, ...]]:
    """For every round one client a stream. All leave at the same random moment, so that the end of all work tells."""
    random = Random(f"{seed} cancel")
    for _ in range(rounds):
        leave_s = random.uniform(0.0, longest_s)
        yield tuple(Cancel(random.uniform(0.0, leave_s), leave_s) for _ in range(streams))

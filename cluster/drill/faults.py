"""The faults that a drill knows, and the acts that they consist of. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What `moesaic drill --fault` takes."""

    KILL = "kill"
    FREEZE = "freeze"
    SLOW = "slow"
    PAIR = "pair"
    PARTITION = "partition"
    NAN = "nan"
    ROUTER = "router"
    CONTROLLER = "controller"
    HEAD = "head"
    SWAP = "swap"
    CANCEL = "cancel"
    OVERLOAD = "overload"
    ALL = "all"


class Act(StrEnum):
    """What is done to a process or, for a cut, to a host."""

    KILL = "kill"
    # Again and again, whenever one has come back.
    DOWN = "down"
    FREEZE = "freeze"
    SLOW = "slow"
    CUT = "cut"
    POISON = "poison"


class Direction(StrEnum):
    """What of a host's traffic is dropped, as this host sees it."""

    BOTH = "both"
    IN = "in"
    OUT = "out"


class Stage(StrEnum):
    """How far a change of experts is, up to the moment at which every router has it."""

    VERIFY = "verify"
    LOAD = "load"
    PROBE = "probe"
    PUBLISH = "publish"
    COMMIT = "commit"
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Injection:
    """One act, `at_s` seconds after the start of its turn; what can be undone is undone after `lasts_s`.

    `targets` are names of processes, or addresses of hosts for a cut. All of them are hit at once.
    `stage`: of the change of experts in whose middle it happens; `change`: which one that was.
    """

    at_s: float
    act: Act
    targets: tuple[str, ...]
    lasts_s: float = 0.0
    direction: Direction = Direction.BOTH
    stage: Stage | None = None
    change: str = ""

    @property
    def title(self) -> str:
        direction = f" {self.direction}" if self.act is Act.CUT else ""
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        amid = f" in {self.stage} of {self.change or 'a change'}" if self.stage else ""
        return f"{self.act} {', '.join(self.targets)}{direction}{lasting}{amid}"


@dataclass(frozen=True, slots=True)
class Targets:
    """Whom the faults may hit, by name.

    `workers`: the experts of each worker, as (layer, slot). `control`: the controller, and Ray's GCS. `hosts`:
    addresses of other hosts with workers. `poisonable`: workers that answer with NaN when they are told to.
    """

    workers: Mapping[str, frozenset[tuple[int, int]]]
    routers: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    poisonable: tuple[str, ...] = ()

"""Does what a schedule says, undoes it, and waits until the cluster is whole again.

Whatever an injection does is a context that undoes it, so an interrupted drill leaves nothing stopped, slow or cut
off.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.drill.cpu_quota import find_cpu_groups, slowed
from cluster.drill.faults import Act, Injection
from cluster.drill.held_down import held_down
from cluster.drill.living import Living, successors
from cluster.drill.network_cut import cut
from cluster.drill.signals import go_on, send, stop

RECOVERY_TIMEOUT_S = 60.0
POLL_S = 0.1
# How the process of `cluster.drill.poisoned_worker` is told; imported there, it would bring torch along.
POISON, CURE = signal.SIGUSR1, signal.SIGUSR2
_DEADLY = (Act.KILL, Act.DOWN)


@dataclass(frozen=True, slots=True)
class Strike:
    """An injection as it happened; times are seconds on the clock of the drill.

    `healed_s`: when it was undone, at once where nothing can be. `whole_s`: when every process was READY again,
    None if that took too long.
    """

    injection: Injection
    start_s: float
    healed_s: float
    whole_s: float | None

    @property
    def recovery_s(self) -> float | None:
        return None if self.whole_s is None else self.whole_s - self.healed_s


class Looking(Protocol):
    """What an injector needs of a cluster."""

    async def look(self) -> Living | None: ...


class Injector:
    """Hits the processes of one cluster."""

    def __init__(
        self,
        cluster: Looking,
        clock: Callable[[], float],
        *,
        is_lost: Callable[[], bool],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`is_lost`: whether the whole cluster has ended, so that waiting for it is in vain."""
        self._cluster = cluster
        self._clock = clock
        self._is_lost = is_lost
        self._sleep = sleep
        self._groups = find_cpu_groups()

    async def inject(self, injection: Injection, living: Living) -> Strike:
        """Returns when the cluster is whole again, or after RECOVERY_TIMEOUT_S."""
        targets = {name: living.pids[name] for name in injection.targets if name in living.pids}
        start_s = self._clock()
        async with self._effect(injection, targets):
            await self._sleep(injection.lasts_s)
        healed_s = self._clock()
        gone = targets.values() if injection.act in _DEADLY else ()
        whole = await self.wait_whole(living.pids, gone)
        return Strike(injection, start_s, healed_s, None if whole is None else self._clock())

    async def wait_whole(self, names: Collection[str] = (), gone: Collection[int] = ()) -> Living | None:
        """The processes once all are READY, those of the `names` included, and none has an id in `gone`.

        None after RECOVERY_TIMEOUT_S, or when the cluster has ended.
        """
        deadline_s = self._clock() + RECOVERY_TIMEOUT_S
        while self._clock() < deadline_s and not self._is_lost():
            living = await self._cluster.look()
            if living is not None and living.pids.keys() >= set(names) and not _any_of(living, gone):
                return living
            await self._sleep(POLL_S)
        return None

    @contextlib.asynccontextmanager
    async def _effect(self, injection: Injection, targets: Mapping[str, int]) -> AsyncIterator[None]:
        pids = tuple(targets.values())
        match injection.act:
            case Act.KILL:
                send(signal.SIGKILL, pids)
                yield
            case Act.DOWN:
                async with held_down(successors(targets)):
                    yield
            case Act.FREEZE:
                stop(pids)
                try:
                    yield
                finally:
                    go_on(pids)
            case Act.POISON:
                send(POISON, pids)
                try:
                    yield
                finally:
                    send(CURE, pids)
            case Act.SLOW:
                async with slowed(pids, self._groups):
                    yield
            case Act.CUT:
                async with cut(injection.targets, injection.direction):
                    yield


def _any_of(living: Living, pids: Collection[int]) -> bool:
    return any(pid in pids for pid in living.pids.values())

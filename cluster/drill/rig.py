"""What every case of a drill works with: one cluster, its API, the prompts and what their answers must be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cluster.bench.load import CompletionsApi, completions_api
from cluster.bench.workload import Lengths, LoadRequest, Workload
from cluster.drill.answers import References
from cluster.drill.injector import Injector
from cluster.drill.living import Cluster, Living
from cluster.drill.load import ask_alone
from cluster.drill.site import Site
from cluster.observation.observer import Observer
from moesaic.errors import Unavailable
from moesaic.garbage import freeze_lasting_objects

# Prompts of different lengths; answers long enough that most faults meet one in its middle. Where experts change they
# are asked in every epoch.
PROMPTS, PROMPTS_OF_EPOCHS = 16, 6
PROMPT_TOKENS = Lengths(16, 96)
ANSWER_TOKENS = Lengths(96, 96)
# A request that takes longer is lost.
REQUEST_TIMEOUT_S = 60.0
_LOOK_TIMEOUT_S = 2.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DrillPlan:
    """How long each fault is drilled beside a control that takes as long, with which seed, under how many streams."""

    seconds: float
    seed: int
    streams: int


@dataclass(frozen=True, slots=True)
class Rig:
    """One cluster at the start of a case, whole and asked once for the reference."""

    plan: DrillPlan
    site: Site
    cluster: Cluster
    injector: Injector
    api: CompletionsApi
    requests: tuple[LoadRequest, ...]
    # The answers of prompts that were asked alone.
    references: References
    living: Living
    say: Say
    clock: Callable[[], float] = time.perf_counter

    @property
    def description(self) -> str:
        """The cluster in words: 4 workers, every expert on at least 2, 1 router."""
        if self.site.by_hand:
            return f"{len(self.site.by_hand)} workers by hand"
        targets = self.living.targets
        copies = Counter(expert for held in targets.workers.values() for expert in held)
        return (
            f"{len(targets.workers)} workers, every expert on at least {min(copies.values(), default=0)}, "
            f"{len(targets.routers)} routers"
        )


@contextlib.asynccontextmanager
async def rig_of(site: Site, plan: DrillPlan, say: Say, *, num_prompts: int = PROMPTS) -> AsyncIterator[Rig]:
    """Raises Unavailable when the cluster is not whole, or does not answer."""
    clock = time.perf_counter
    async with (
        Observer(site.grpc, timeout_s=_LOOK_TIMEOUT_S, clock=clock) as observer,
        completions_api(site.url, site.model, clock, timeout_s=REQUEST_TIMEOUT_S) as api,
    ):
        cluster = Cluster(site, observer)
        injector = Injector(cluster, clock, is_lost=lambda: site.has_ended)
        living = await injector.wait_whole()
        if living is None:
            raise Unavailable("the cluster is not whole: not every process is READY")
        vocab_size = (await observer.observe_routers()).model.vocab_size
        workload = Workload(PROMPT_TOKENS, ANSWER_TOKENS, shared_prefix=0, seed=plan.seed)
        requests = tuple(workload.requests(num_prompts, vocab_size, batch="drill"))
        references = await ask_alone(api.send, requests, clock)
        freeze_lasting_objects()  # a collection of the drill's own would look like a pause of the cluster
        yield Rig(plan, site, cluster, injector, api, requests, references, living, say)


async def sleep_until(due_s: float, clock: Callable[[], float]) -> None:
    await asyncio.sleep(max(0.0, due_s - clock()))

"""The controller against a cluster that is only played: what it publishes, and when."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cluster.control.controller import Cluster, Controller, Member
from cluster.control.epoch_store import EpochStore
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.process_report import CANNOT_START, PROCESS_DIED, ProcessReport
from cluster.control.worker_facts import WorkerFacts
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica, Snapshot
from moesaic.v1 import control_pb2 as pb

pytestmark = pytest.mark.timeout(300)

# A played process holds a question for less long than the controller pauses after one that was not answered.
HOLD_S = 0.005

EXPERTS = {
    "w0": frozenset({ExpertAddress(0, 0), ExpertAddress(1, 0)}),
    "w1": frozenset({ExpertAddress(0, 1), ExpertAddress(1, 1)}),
}
CLUSTER = Cluster(
    model="tiny",
    experts=frozenset().union(*EXPERTS.values()),
    members=(
        Member("controller", pb.PROCESS_ROLE_CONTROLLER),
        Member("router", pb.PROCESS_ROLE_ROUTER),
        *(Member(name, pb.PROCESS_ROLE_EXPERT_WORKER, held, "cpu") for name, held in EXPERTS.items()),
    ),
)


def digest(address: ExpertAddress, salt: int = 0) -> bytes:
    return bytes([address.layer, address.slot, salt]) + bytes(29)


def holdings(name: str, salt: int = 0) -> frozenset[ExpertVersion]:
    return frozenset(ExpertVersion(address, digest(address, salt)) for address in EXPERTS[name])


def replica(name: str, start: int = 1, salt: int = 0) -> Replica:
    return Replica(name, f"127.0.0.1:{start}", f"{name}-{start}", holdings(name, salt))


@dataclass
class PlayedCluster:
    """An observer whose processes do what the test says."""

    reports: dict[str, ProcessReport | None] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    described: list[str] = field(default_factory=list)
    # Processes that do not answer, how often each was asked in vain, and the reason in what is raised.
    silent: set[str] = field(default_factory=set)
    asked_in_vain: Counter[str] = field(default_factory=Counter)
    undescribed: set[str] = field(default_factory=set)
    reason_of_death: str = PROCESS_DIED

    async def tell(
        self, name: str, state: pb.ProcessState, revision: int, start: int = 1, detail: str = ""
    ) -> None:
        async with self.changed:
            self.reports[name] = ProcessReport(
                name, revision, state, f"127.0.0.1:{start}", "n", 100 + start, start - 1, 5, 10, detail
            )
            self.changed.notify_all()

    async def ready(self, name: str, start: int = 1, salt: int = 0) -> None:
        self.replicas[f"127.0.0.1:{start}"] = replica(name, start, salt)
        await self.tell(name, pb.PROCESS_STATE_READY, 3, start)

    async def load(self, name: str, start: int, contents: frozenset[ExpertVersion]) -> None:
        """The same process holds something else from now on."""
        before = self.reports[name]
        assert before is not None
        self.replicas[f"127.0.0.1:{start}"] = Replica(name, f"127.0.0.1:{start}", f"{name}-{start}", contents)
        async with self.changed:
            self.reports[name] = replace(
                before, revision=before.revision + 1, contents_revision=before.contents_revision + 1
            )
            self.changed.notify_all()

    async def kill(self, name: str) -> None:
        async with self.changed:
            self.reports[name] = None
            self.changed.notify_all()

    async def fall_silent(self, *names: str) -> None:
        async with self.changed:
            self.silent |= set(names)
            self.changed.notify_all()

    async def report(self, name: str, seen: int) -> ProcessReport:
        async with self.changed:
            await self.changed.wait_for(lambda: name in self.reports)
            with suppress(TimeoutError):
                async with asyncio.timeout(HOLD_S):
                    await self.changed.wait_for(lambda: self._news(name, seen) or name in self.silent)
            report = self.reports[name]
            if name in self.silent:
                self.asked_in_vain[name] += 1
                raise Unavailable("it does not answer")
        if report is None:
            raise Unavailable("it died", reason=self.reason_of_death)
        return report

    async def describe(self, address: str) -> WorkerFacts:
        self.described.append(address)
        if address in self.undescribed:
            raise Unavailable("it does not answer")
        return WorkerFacts(self.replicas[address])

    def _news(self, name: str, seen: int) -> bool:
        report = self.reports[name]
        return report is None or report.revision != seen


async def sleep_briefly(seconds: float) -> None:
    await asyncio.sleep(0.01)


@asynccontextmanager
async def following(
    played: PlayedCluster, cluster: Cluster = CLUSTER, first_revision: int = 0
) -> AsyncIterator[Controller]:
    with tempfile.TemporaryDirectory() as folder:
        store = EpochStore(Path(folder), model=cluster.model, base=cluster.base)
        epochs = EpochsInUse(store, drain_s=60.0)
        controller = Controller(cluster, played, epochs, first_revision=first_revision, sleep=sleep_briefly)
        running = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            store.close()


async def until(snapshots: AsyncIterator[Snapshot], *workers: str) -> Snapshot:
    """The next snapshot whose table has just these workers."""
    async with asyncio.timeout(60):
        async for snapshot in snapshots:
            if tuple(replica.worker for replica in snapshot.table.replicas) == workers:
                return snapshot
    raise AssertionError("the watch ended")


def process(controller: Controller, name: str) -> pb.Process:
    return next(process for process in controller.topology().processes if process.name == name)


async def test_nothing_is_published_before_every_worker_was_heard_of() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        first = asyncio.ensure_future(anext(controller.watch()))
        await played.ready("w0", 1)
        await asyncio.sleep(0.02)
        assert not first.done()
        await played.tell("w1", pb.PROCESS_STATE_LOADING, 2, 2)
        snapshot = await asyncio.wait_for(first, 60)
        assert [replica.worker for replica in snapshot.table.replicas] == ["w0"]
        assert snapshot.epoch is None


async def test_the_epoch_is_named_once_every_expert_is_held() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        snapshot = await until(controller.watch(), "w0", "w1")
        assert snapshot.epoch is not None
        assert snapshot.epoch.model == "tiny"
        assert set(snapshot.epoch.versions) == EXPERTS["w0"] | EXPERTS["w1"]
        assert controller.topology().epoch == snapshot.epoch.id


async def test_a_worker_that_dies_leaves_the_table_and_comes_back_as_another_replica() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(snapshots, "w0", "w1")
        await played.kill("w1")
        without = await until(snapshots, "w0")
        assert without.table.revision > before.table.revision
        assert without.epoch == before.epoch
        lost = process(controller, "w1")
        assert (lost.state, lost.detail, lost.address, lost.pid) == (
            pb.PROCESS_STATE_PENDING,
            "it died",
            "",
            0,
        )
        await played.ready("w1", 3)
        after = await until(snapshots, "w0", "w1")
        assert after.table.revision > without.table.revision
        assert after.table.replicas[1].incarnation == "w1-3"
        assert (process(controller, "w1").restarts, process(controller, "w1").detail) == (2, "")


async def asked_in_vain(played: PlayedCluster, times: int, *names: str) -> None:
    async with asyncio.timeout(60):
        while any(played.asked_in_vain[name] < times for name in names):
            await asyncio.sleep(0.002)


async def test_a_worker_that_misses_one_question_stays_in_the_table() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(controller.watch(), "w0", "w1")
        await played.fall_silent("w1")
        await asked_in_vain(played, 1, "w1")
        played.silent.clear()
        while process(controller, "w1").detail:
            await asyncio.sleep(0.002)
        assert (await anext(controller.watch())) is before
        assert played.described.count("127.0.0.1:2") == 2  # its health stream is opened anew


async def test_a_worker_that_stays_silent_while_the_others_are_heard_leaves_the_table() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        await played.fall_silent("w1")
        await until(snapshots, "w0")
        lost = process(controller, "w1")
        assert (lost.state, lost.detail) == (pb.PROCESS_STATE_PENDING, "it does not answer")


async def test_a_controller_that_hears_nobody_takes_no_replica_away() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(controller.watch(), "w0", "w1")
        await played.fall_silent("w0", "w1")
        await asked_in_vain(played, 5, "w0", "w1")
        assert (await anext(controller.watch())) is before
        silent = process(controller, "w1")
        assert (silent.state, silent.detail) == (pb.PROCESS_STATE_READY, "it does not answer")


async def test_a_restarted_controller_that_hears_nobody_publishes_nothing() -> None:
    played = PlayedCluster()
    await played.ready("w0", 1)
    await played.ready("w1", 2)
    await played.fall_silent("w0", "w1")
    async with following(played) as controller:
        first = asyncio.ensure_future(anext(controller.watch()))
        await asked_in_vain(played, 5, "w0", "w1")
        assert not first.done()
        played.silent.clear()
        assert len((await asyncio.wait_for(first, 60)).table.replicas) >= 1


async def test_another_process_in_the_place_of_a_worker_ends_the_old_replica_before_it_is_described() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        played.undescribed.add("127.0.0.1:3")
        await played.ready("w1", 3)
        await until(snapshots, "w0")
        played.undescribed.clear()
        assert (await until(snapshots, "w0", "w1")).table.replicas[1].incarnation == "w1-3"


async def test_a_worker_of_another_model_is_left_out_and_said_to_be_one() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        strange = ExpertVersion(ExpertAddress(7, 0), bytes(32))
        await played.load("w1", 2, holdings("w1") | {strange})
        await until(snapshots, "w0")
        assert process(controller, "w1").detail == "it holds experts of layer 7, in which the model has none"


async def test_a_process_that_cannot_be_started_where_it_was_placed_has_failed() -> None:
    played = PlayedCluster(reason_of_death=CANNOT_START)
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.kill("w1")
        await until(controller.watch(), "w0")
        failed = process(controller, "w1")
        assert (failed.state, failed.detail) == (pb.PROCESS_STATE_FAILED, "it died")


def absences(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """What was said of processes, with its level; not what was published."""
    records = [record for record in caplog.records if record.getMessage().startswith("process ")]
    return [(record.levelno, record.getMessage()) for record in records]


async def test_only_a_process_that_was_ready_is_called_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(controller.watch(), "w0", "w1")
        await played.kill("w1")
        await until(controller.watch(), "w0")
    assert absences(caplog) == [(logging.WARNING, "process lost")]


async def test_a_process_that_has_not_begun_is_starting_and_not_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    played = PlayedCluster(reason_of_death="")
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.kill("w1")
        await until(controller.watch(), "w0")
        waiting = process(controller, "w1")
        assert (waiting.state, waiting.detail) == (pb.PROCESS_STATE_PENDING, "it died")
    assert absences(caplog) == [(logging.INFO, "process is starting")]


async def test_a_process_that_dies_while_it_starts_again_did_not_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(controller.watch(), "w0", "w1")
        await played.kill("w1")
        await until(controller.watch(), "w0")
        await played.tell("w1", pb.PROCESS_STATE_LOADING, 2, 3)
        while process(controller, "w1").state != pb.PROCESS_STATE_LOADING:
            await asyncio.sleep(0.002)
        await played.kill("w1")
        while process(controller, "w1").state != pb.PROCESS_STATE_PENDING:
            await asyncio.sleep(0.002)
    assert absences(caplog) == [(logging.WARNING, "process lost"), (logging.WARNING, "process did not start")]


async def test_a_restart_between_two_looks_is_seen_by_the_report() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        await played.tell("w1", pb.PROCESS_STATE_LOADING, 2, 3)
        await until(snapshots, "w0")
        await played.ready("w1", 3)
        assert (await until(snapshots, "w0", "w1")).table.replicas[1].address == "127.0.0.1:3"


async def test_a_draining_worker_leaves_the_table() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        await played.tell("w0", pb.PROCESS_STATE_DRAINING, 4, 1)
        await until(snapshots, "w1")


async def test_the_same_report_again_neither_asks_the_worker_nor_publishes() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(controller.watch(), "w0", "w1")
        controller._keep(played.reports["w0"], await controller._facts_of(played.reports["w0"]))  # type: ignore[arg-type]
        assert played.described == ["127.0.0.1:1", "127.0.0.1:2"]
        assert (await anext(controller.watch())) is before


async def test_a_replica_serves_only_the_versions_that_the_epoch_names() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(snapshots, "w0", "w1")
        await played.kill("w1")
        await until(snapshots, "w0")
        await played.ready("w1", 3, salt=9)
        while process(controller, "w1").state != pb.PROCESS_STATE_FAILED:
            await asyncio.sleep(0.002)
        assert process(controller, "w1").detail.startswith(
            "it holds other weights than the epoch in 2 of its experts, first layer 0 slot 1"
        )
        await played.kill("w0")
        assert (await until(snapshots)).table.replicas == ()


async def test_a_replica_with_other_weights_is_named_beside_the_one_whose_weights_are_used() -> None:
    played = PlayedCluster()
    more = Member("w2", pb.PROCESS_ROLE_EXPERT_WORKER, EXPERTS["w0"])
    twice = replace(CLUSTER, members=(*CLUSTER.members, more))
    async with following(played, twice) as controller:
        await played.tell("w2", pb.PROCESS_STATE_LOADING, 2, 3)
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(controller.watch(), "w0", "w1")
        played.replicas["127.0.0.1:3"] = Replica("w2", "127.0.0.1:3", "w2-3", holdings("w0", 7))
        await played.tell("w2", pb.PROCESS_STATE_READY, 3, 3)
        while process(controller, "w2").state != pb.PROCESS_STATE_FAILED:
            await asyncio.sleep(0.002)
        assert "other weights than w0 on node n in 2 of its experts" in process(controller, "w2").detail
        assert (await anext(controller.watch())) is before


async def test_new_contents_of_the_same_incarnation_are_described_again() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        snapshots = controller.watch()
        await played.ready("w0", 1)
        played.replicas["127.0.0.1:2"] = Replica("w1", "127.0.0.1:2", "w1-2", frozenset())
        await played.tell("w1", pb.PROCESS_STATE_READY, 3, 2)
        assert (await until(snapshots, "w0")).epoch is None
        await played.load("w1", 2, holdings("w1"))
        complete = await until(snapshots, "w0", "w1")
        assert complete.epoch is not None
        assert complete.table.replicas[1].incarnation == "w1-2"
        assert played.described.count("127.0.0.1:2") == 2


async def test_a_second_look_at_a_worker_that_was_started_again_is_refused_until_it_reports() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(controller.watch(), "w0", "w1")
        played.replicas["127.0.0.1:2"] = Replica("w1", "127.0.0.1:2", "w1-3", frozenset())
        with pytest.raises(Unavailable, match="w1 was started again"):
            await controller.look_again("w1")


async def test_a_version_beside_the_one_in_use_is_not_served_and_does_no_harm() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        before = await until(controller.watch(), "w0", "w1")
        await played.load("w1", 2, holdings("w1") | holdings("w1", 9))
        while len(played.described) < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert (await anext(controller.watch())) is before
        assert (process(controller, "w1").state, process(controller, "w1").detail) == (
            pb.PROCESS_STATE_READY,
            "",
        )


async def test_workers_that_disagree_are_a_problem_of_the_controller() -> None:
    played = PlayedCluster()
    more = Member("w2", pb.PROCESS_ROLE_EXPERT_WORKER, EXPERTS["w0"])
    twice = replace(CLUSTER, members=(*CLUSTER.members, more))
    async with following(played, twice) as controller:
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        other = Replica("w2", "127.0.0.1:3", "w2-3", holdings("w0", 7))
        played.replicas["127.0.0.1:3"] = other
        await played.tell("w2", pb.PROCESS_STATE_READY, 3, 3)
        snapshot = await until(controller.watch(), "w0", "w1", "w2")
        assert snapshot.epoch is None
        own = process(controller, "controller")
        assert own.state == pb.PROCESS_STATE_FAILED
        assert own.detail == (
            "workers hold different versions of layer 0 slot 0: "
            "w0 on node n and w2 on node n read different model folders"
        )


async def test_a_model_without_experts_has_an_epoch_as_soon_as_anybody_is_heard_of() -> None:
    played = PlayedCluster()
    alone = Cluster("tiny", frozenset(), CLUSTER.members[:2])
    async with following(played, alone) as controller:
        await played.tell("router", pb.PROCESS_STATE_LOADING, 1)
        snapshot = await until(controller.watch())
        assert snapshot.epoch == Epoch.of("tiny", {})
        assert snapshot.table.replicas == ()


async def test_a_restarted_controller_publishes_above_the_revisions_of_the_one_before() -> None:
    played = PlayedCluster()
    await played.ready("w0", 1)
    await played.ready("w1", 2)
    async with following(played, first_revision=1 << 32) as controller:
        snapshot = await until(controller.watch(), "w0", "w1")
        assert snapshot.table.revision > 1 << 32


async def test_a_worker_that_answers_under_another_name_is_not_taken_for_it() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.ready("w0", 1)
        played.replicas["127.0.0.1:2"] = replica("w0", 2)
        await played.tell("w1", pb.PROCESS_STATE_READY, 3, 2)
        assert (await until(controller.watch(), "w0")).epoch is None
        assert process(controller, "w1").detail == "127.0.0.1:2 is w0 now"


async def test_a_slow_watcher_gets_the_newest_snapshot_and_not_those_in_between() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        slow = controller.watch()
        await played.ready("w0", 1)
        await played.ready("w1", 2)
        await until(controller.watch(), "w0", "w1")
        for revision in range(4, 8):
            state = pb.PROCESS_STATE_READY if revision % 2 else pb.PROCESS_STATE_DRAINING
            await played.tell("w1", state, revision, 2)
            await asyncio.sleep(0.01)
        newest = (await anext(controller.watch())).table.revision
        assert newest > 4
        assert (await anext(slow)).table.revision == newest


async def test_the_topology_shows_progress_and_why_a_process_failed() -> None:
    played = PlayedCluster()
    async with following(played) as controller:
        await played.tell("w0", pb.PROCESS_STATE_LOADING, 2, 1)
        await played.tell("w1", pb.PROCESS_STATE_FAILED, 2, 2, detail="no memory")
        await until(controller.watch())
        loading, failed = process(controller, "w0"), process(controller, "w1")
        assert (loading.loaded_bytes, loading.total_bytes, loading.device) == (5, 10, "cpu")
        assert [(address.layer, address.slot) for address in loading.experts] == [(0, 0), (1, 0)]
        assert (failed.state, failed.detail) == (pb.PROCESS_STATE_FAILED, "no memory")
        assert process(controller, "router").state == pb.PROCESS_STATE_PENDING

"""A router that follows a controller from epoch to epoch, over two real workers that hold different weights."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.expert_calls import ReferenceExperts
from support.local_router import router_config
from support.processes import running_workers

from moesaic import rpc
from moesaic.client.client import Client
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, ExpertVersion, GateRow, versions_to_proto
from moesaic.errors import Aborted, FailedPrecondition
from moesaic.expert_policy import ExpertPolicy
from moesaic.routing_table import Canary, Replica, RoutingTable, Snapshot
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc
from router.control.cluster_watch import ControlWatch, NamedWorkers
from router.server import RouterServer

WAIT_S = 60.0
PROMPT = [90, 91, 92, 17]
LONG = 200
SWAPPED = ExpertAddress(0, 1)


@dataclass
class Controller(control_pb2_grpc.ControlServiceServicer):
    """Publishes what the test says, and keeps what the router reports."""

    snapshots: asyncio.Queue[Snapshot] = field(default_factory=asyncio.Queue)
    reports: list[control_pb2.ReportEpochsRequest] = field(default_factory=list)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[control_pb2.WatchResponse]:
        while True:
            yield (await self.snapshots.get()).to_proto()

    async def ReportEpochs(
        self, request: control_pb2.ReportEpochsRequest, context: Any
    ) -> control_pb2.ReportEpochsResponse:
        self.reports.append(request)
        return control_pb2.ReportEpochsResponse()

    async def until(self, condition: Callable[[control_pb2.ReportEpochsRequest], bool]) -> None:
        """Returns with the first report, from now on, for which the condition holds."""
        seen = len(self.reports)
        async with asyncio.timeout(WAIT_S):
            while not any(condition(report) for report in self.reports[seen:]):
                await asyncio.sleep(0.02)


@dataclass
class Site:
    client: Client
    controller: Controller
    model: Path
    worker: str
    table: RoutingTable
    # That of the first worker's folder, and the same with one expert of the other's.
    base: Epoch
    swapped: Epoch

    async def publish(self, epoch: Epoch, canary: Canary | None = None, drain_s: float | None = None) -> None:
        """Returns when the router says that it uses this."""
        self.controller.snapshots.put_nowait(Snapshot(epoch, self.table, canary, drain_s))
        wanted = (epoch.id, "" if canary is None else canary.epoch.id)
        await self.controller.until(lambda report: (report.epoch, report.canary) == wanted)

    async def ask(self, max_tokens: int = 24, **options: Any) -> tuple[str, tuple[int, ...]]:
        answer = await self.client.complete(
            PROMPT, max_tokens=max_tokens, temperature=0, ignore_eos=True, timeout_s=WAIT_S, **options
        )
        return answer.epoch, tuple(answer.token_ids)

    async def add(self, folder: Path, name: str) -> Epoch:
        """Loads a bundle with a new expert for every layer into the first worker; the epoch that has them."""
        bundle = make_bundle(folder, self.model, [(0, None), (1, None)], name=name, seed=3)
        new = {
            ExpertAddress(expert.layer, 4): bytes.fromhex(expert.version)
            for expert in bundle.manifest.experts
        }
        async with rpc.aio_channel(self.worker) as channel:
            stub = expert_pb2_grpc.WorkerControlServiceStub(channel)
            versions = versions_to_proto(map(ExpertVersion._make, new.items()))
            request = expert_pb2.LoadRequest(bundle=bundle.digest, experts=versions, folder=str(folder))
            async for _ in stub.Load(request, timeout=WAIT_S):
                pass
        own = await described_holdings(self.worker)
        others = (replica for replica in self.table.replicas if replica.address != self.worker)
        self.table = RoutingTable(2, (own, *others))
        rows = {
            ExpertAddress(expert.layer, 4): GateRow(bundle.read(expert.gate_row.tensor))
            for expert in bundle.manifest.experts
            if expert.gate_row is not None
        }
        return Epoch.of(
            self.base.model,
            {**self.base.versions, **new},
            gate_rows=rows,
            bundles=[EpochBundle(name, bundle.digest, (), tuple(new))],
        )


async def described_holdings(worker: str) -> Replica:
    async with rpc.aio_channel(worker) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        return Replica.from_description(worker, await stub.Describe(expert_pb2.DescribeRequest()))


def two_epochs(own: Snapshot, other: Snapshot) -> tuple[Epoch, Epoch, RoutingTable]:
    assert own.epoch is not None and other.epoch is not None
    bundle = EpochBundle("style", b"s" * 32, ("tone",), (SWAPPED,))
    versions = {**own.epoch.versions, SWAPPED: other.epoch.versions[SWAPPED]}
    swapped = Epoch.of(own.epoch.model, versions, bundles=[bundle])
    return own.epoch, swapped, RoutingTable(1, (*own.table.replicas, *other.table.replicas))


async def described(model: Path, address: str) -> Snapshot:
    named = NamedWorkers([address], model=model.name, experts=ReferenceExperts(model).model.addresses)
    async with asyncio.timeout(WAIT_S):
        snapshot = await anext(watched := named.watch())
        await watched.aclose()
    return snapshot


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Site]:
    switch_interval = sys.getswitchinterval()
    model, other = write_mixtral(tmp_path / "tiny"), write_mixtral(tmp_path / "other", seed=1)
    with running_workers(model, ["all"]) as own, running_workers(other, ["all"]) as others:
        snapshots = [await described(model, own[0].address), await described(other, others[0].address)]
        base, swapped, table = two_epochs(*snapshots)
        controller = Controller()
        control = rpc.Server(
            {
                rpc.CONTROL_SERVICE: lambda server: control_pb2_grpc.add_ControlServiceServicer_to_server(
                    controller, server
                )
            }
        )
        control_address = f"127.0.0.1:{await control.start('127.0.0.1', 0)}"

        async def resolve() -> str:
            return control_address

        server = RouterServer(router_config(model, "auto"), ControlWatch(resolve))
        address = await server.start()
        controller.snapshots.put_nowait(Snapshot(base, table))
        try:
            await server.load()
            await server.wait_ready(WAIT_S)
            async with Client(address) as client:
                yield Site(client, controller, model, own[0].address, table, base, swapped)
        finally:
            await server.stop(0)
            await control.stop(0)
            sys.setswitchinterval(switch_interval)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(tmp_path) as site:
        yield site


async def test_a_swap_is_seen_by_new_requests_while_a_running_one_keeps_what_it_began_with(
    site: Site,
) -> None:
    _, before = await site.ask(LONG)
    stream = site.client.generate(PROMPT, max_tokens=LONG, temperature=0, ignore_eos=True, timeout_s=WAIT_S)
    running = [await anext(stream)]
    await site.publish(site.swapped)
    during = await asyncio.gather(*(site.ask() for _ in range(4)))
    running += [token async for token in stream]
    assert {token.epoch for token in running} == {site.base.id}
    assert tuple(token_id for token in running for token_id in token.token_ids) == before
    _, after = await site.ask()
    assert set(during) == {(site.swapped.id, after)} and after != before[:24]
    await site.controller.until(lambda report: [one.epoch for one in report.epochs] == [site.swapped.id])
    await site.publish(site.base)
    assert await site.ask(LONG) == (site.base.id, before)


async def test_a_canary_has_its_sessions_a_name_and_figures(site: Site) -> None:
    expected = {}
    for epoch in (site.base, site.swapped):
        await site.publish(epoch)
        expected[epoch.id] = (await site.ask())[1]
    await site.publish(site.base, Canary(site.swapped, 0.5))
    answers = await asyncio.gather(*(site.ask(session=f"session-{n}") for n in range(16)))
    assert {epoch for epoch, _ in answers} == {site.base.id, site.swapped.id}
    assert all(tokens == expected[epoch] for epoch, tokens in answers)
    assert answers == await asyncio.gather(*(site.ask(session=f"session-{n}") for n in range(16)))
    for epoch in expected:
        assert await site.ask(epoch=epoch) == (epoch, expected[epoch])
    with pytest.raises(FailedPrecondition) as refused:
        await site.ask(epoch="0123456789abcdef")
    assert refused.value.field == "epoch"
    num_on_trial = 2 * sum(epoch == site.swapped.id for epoch, _ in answers) + 1
    await site.controller.until(
        lambda report: report.epochs[-1].finished >= num_on_trial and report.epochs[-1].token_p50_s > 0
    )


async def test_a_denied_expert_computes_nothing_whatever_the_epoch(site: Site) -> None:
    await site.publish(site.swapped)
    by_name = await site.ask(LONG, experts=ExpertPolicy(deny=("style",)))
    assert by_name == await site.ask(LONG, experts=ExpertPolicy(deny=("0:1",)))
    await site.publish(site.base)
    _, tokens = await site.ask(LONG, experts=ExpertPolicy(deny=("0:1",)))
    assert tokens == by_name[1] != (await site.ask(LONG))[1]


async def test_an_added_bundle_computes_whoever_does_not_deny_it_side_by_side_with_the_epoch_before(
    site: Site, tmp_path: Path
) -> None:
    _, before = await site.ask(LONG)
    grown = await site.add(tmp_path / "maths", "maths-v1")
    await site.publish(site.base, Canary(grown, 0.0))
    denied, added, plain, swapped = await asyncio.gather(
        site.ask(LONG, epoch=grown.id, experts=ExpertPolicy(deny=("maths-v1",))),
        site.ask(LONG, epoch=grown.id),
        site.ask(LONG),
        site.ask(LONG, experts=ExpertPolicy(top_k=1)),
    )
    assert denied == (grown.id, before) and plain == (site.base.id, before)
    assert added[0] == grown.id and len({before, added[1], swapped[1]}) == 3
    await site.publish(grown)
    assert await site.ask(LONG) == added


async def test_who_outlives_the_drain_is_told_so_and_how_far_it_got(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.server.HEALTH_PERIOD_S", 0.01)
    stream = site.client.generate(
        PROMPT, max_tokens=LONG, n=16, temperature=0, ignore_eos=True, timeout_s=WAIT_S
    )
    await anext(stream)
    await site.publish(site.swapped, drain_s=1e-3)
    with pytest.raises(Aborted, match=r"retired after \d+ tokens") as ended:
        async for _ in stream:
            pass
    assert ended.value.reason == "epoch_retired"


async def test_rows_are_compared_with_what_a_canary_would_have_said_and_never_used(site: Site) -> None:
    expected = await site.ask()
    await site.publish(site.base, Canary(site.swapped, 0.0, 1.0))
    async with asyncio.timeout(WAIT_S):
        while not site.controller.reports[-1].epochs[-1].shadow_rows:
            assert await site.ask() == expected
    figures = site.controller.reports[-1].epochs[-1]
    assert figures.epoch == site.swapped.id and figures.finished == 0
    assert -1 <= figures.shadow_min_cosine <= figures.shadow_mean_cosine < 0.99
    assert figures.shadow_max_difference > 0

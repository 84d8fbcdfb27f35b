"""What reaches a controller: reports of routers, orders to change the model, bundles, descriptions of workers; and what it
publishes, at a router.

The whole control plane runs, in virtual time, beside workers and routers that are played. Whatever comes, its loops go on.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support.fuzzing import fuzzed, refusals
from support.message_lists import join, parsed, split
from support.mutations import bytes_near, json_near, message_near
from support.played_base import HIDDEN, base_model, write_played_bundle
from support.rollout_world import PlayedWorker, World, folder_version

from cluster.control.change_order import ChangeOrder, Shares
from cluster.control.service import ControlService
from cluster.control.worker_facts import WorkerFacts
from moesaic.bundles import Bundle
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow, versions_to_proto
from moesaic.errors import MoesaicError
from moesaic.routing_table import Canary, Replica, RoutingTable, Snapshot
from moesaic.v1 import common_pb2, control_pb2, expert_pb2
from router.control.epochs import EpochBook
from router.gating.policy import LayerShape

BASE = base_model()
NUM_SLOTS = 3
# What stands in an input for the ids of the epochs, which are hashes.
CURRENT, TRIED = "current", "tried"
PLACE = tempfile.TemporaryDirectory()


@cache
def bundles() -> tuple[Bundle, Bundle]:
    """One that takes the place of two experts, and one that adds a slot."""
    place = Path(PLACE.name)
    return (
        write_played_bundle(place / "legal", BASE, "legal", [(0, 0), (1, 2)]),
        write_played_bundle(place / "maths", BASE, "maths", [(0, None)]),
    )


class SpoiltWorld(World):
    """The second worker describes itself as an input says."""

    description: bytes | None = None

    async def describe(self, address: str) -> WorkerFacts:
        if self.description is None or address != "w1":
            return await super().describe(address)
        description = parsed(expert_pb2.DescribeResponse, self.description)
        if description is None:
            return await super().describe(address)
        return WorkerFacts.from_description(address, description)


@contextlib.contextmanager
def world() -> Iterator[SpoiltWorld]:
    """Both workers hold everything, and an epoch is current."""
    home = frozenset(BASE.model.addresses)
    with tempfile.TemporaryDirectory() as folder:
        world = SpoiltWorld(Path(folder), BASE, [PlayedWorker(name, name, home, 20) for name in ("w0", "w1")])
        try:
            world.pass_time(6.0)
            yield world
            world.pass_time(3.0)
            assert not world.tasks[0].done(), "the loops of the control plane ended"
            for snapshot in (world.plane.controller.topology(), *told(world)):
                snapshot.SerializeToString()
        finally:
            world.close()


def told(world: World) -> list[control_pb2.WatchResponse]:
    """What routers have been told last, as they read it."""
    messages = [router.told.to_proto() for router in world.routers if router.told]
    for message in messages:
        Snapshot.from_proto(control_pb2.WatchResponse.FromString(message.SerializeToString()))
    return messages


def near(*messages: Any) -> st.SearchStrategy[bytes]:
    whole = st.one_of([message_near(message) for message in messages])
    return whole | bytes_near(whole)


STATS = {
    "open_sequences": 2,
    "finished": 50,
    "failed": 1,
    "not_finite": 1,
    "token_p50_s": 0.1,
    "token_p99_s": 0.2,
    "first_token_p50_s": 0.3,
    "shadow_rows": 40,
    "shadow_min_cosine": 0.9,
    "shadow_mean_cosine": 0.95,
    "shadow_max_difference": 0.1,
}
REPORT = control_pb2.ReportEpochsRequest(
    router="router-7",
    incarnation="1",
    address="127.0.0.1:1",
    epoch=CURRENT,
    canary=TRIED,
    routing_table_revision=1 << 32,
    epochs=[control_pb2.EpochStats(epoch=epoch, **STATS) for epoch in (CURRENT, TRIED)],
)


@fuzzed("router_reports", near(REPORT), examples=6)
def test_a_report_changes_nothing_but_what_is_known_of_its_router(raw: bytes) -> None:
    report = parsed(control_pb2.ReportEpochsRequest, raw)
    if report is None:
        return
    with world() as there:
        there.upload(bundles()[0])
        there.change(ChangeOrder("swap", bundles()[0].digest, canary=Shares(0.1, 0.1)))
        head = there.plane.epochs.head
        assert head is not None and head.canary is not None
        ids = {CURRENT: head.current, TRIED: head.canary.epoch}
        for part in (report, *report.epochs):
            part.epoch = ids.get(part.epoch, part.epoch)
        report.canary = ids.get(report.canary, report.canary)
        with refusals():
            there.run(ControlService(there.plane).ReportEpochs(report, None))
        there.pass_time(3.0)
        assert there.plane.epochs.head is not None and there.plane.epochs.head.current == head.current


def orders() -> st.SearchStrategy[bytes]:
    swapped, added = bundles()
    row = common_pb2.GateRow(
        address=common_pb2.ExpertAddress(layer=0, slot=0), values=bytes(4 * HIDDEN), bias=0.5
    )
    kinds = {
        name: getattr(control_pb2, f"CHANGE_KIND_{name}") for name in ("SWAP", "ADD", "REMOVE", "PROMOTE")
    }
    asked = {"expected_epoch": CURRENT, "operator": "o"}
    return near(
        control_pb2.ChangeRequest(
            kind=kinds["SWAP"], bundle=swapped.digest, canary=True, share=0.5, shadow_share=0.1, **asked
        ),
        control_pb2.ChangeRequest(kind=kinds["ADD"], bundle=added.digest, gate_rows=[row], **asked),
        control_pb2.ChangeRequest(kind=kinds["REMOVE"], name="maths", **asked),
        control_pb2.ChangeRequest(kind=kinds["PROMOTE"], **asked),
        control_pb2.ChangeRequest(kind=control_pb2.CHANGE_KIND_ROLLBACK, epoch=CURRENT, **asked),
    )


@fuzzed("change_orders", st.deferred(orders), examples=6)
def test_an_order_becomes_an_epoch_that_can_be_published_or_is_refused(raw: bytes) -> None:
    order = parsed(control_pb2.ChangeRequest, raw)
    if order is None:
        return
    with world() as there:
        for bundle in bundles():
            there.upload(bundle)
        there.change(ChangeOrder("add", bundles()[1].digest))
        assert there.plane.epochs.head is not None
        for name in ("expected_epoch", "epoch"):
            if getattr(order, name) == CURRENT:
                setattr(order, name, there.plane.epochs.head.current)
        with refusals():
            there.run(carry_out(there, order))
        history = there.run(ControlService(there.plane).GetHistory(control_pb2.GetHistoryRequest(), None))
        history.SerializeToString()


async def carry_out(world: World, order: control_pb2.ChangeRequest) -> None:
    async for step in ControlService(world.plane).Change(order, None):
        step.SerializeToString()


def uploads() -> st.SearchStrategy[bytes]:
    bundle = bundles()[1]
    weights = bundle.weights_file.read_bytes()

    def messages(manifest: bytes) -> bytes:
        half = len(weights) // 2
        parts = [{"manifest": manifest}, {"weights": weights[:half]}, {"weights": weights[half:]}]
        return join(control_pb2.UploadBundleRequest(**part).SerializeToString() for part in parts)

    whole = st.builds(messages, st.just(bundle.manifest_bytes))
    return (
        whole
        | bytes_near(whole)
        | bytes_near(st.builds(messages, json_near(json.loads(bundle.manifest_bytes))))
    )


@fuzzed("uploads", st.deferred(uploads), examples=6)
def test_an_upload_leaves_a_bundle_or_nothing(raw: bytes) -> None:
    requests = [parsed(control_pb2.UploadBundleRequest, message) for message in split(raw)]
    with world() as there:
        service = ControlService(there.plane)
        try:
            stored = there.run(service.UploadBundle(arriving(requests), None))
        except MoesaicError:
            assert not list(there.plane.bundles.digests())
            with refusals():
                raise
        else:
            assert there.plane.bundles.digests() == [stored.digest]
        there.run(service.ListBundles(control_pb2.ListBundlesRequest(), None)).SerializeToString()
        assert {path.name for path in (there.config.state / "bundles").iterdir()} == {
            digest.hex() for digest in there.plane.bundles.digests()
        }


async def arriving(requests: list[Any]) -> AsyncIterator[control_pb2.UploadBundleRequest]:
    """Up to the first that gRPC refuses."""
    for request in requests:
        if request is None:
            return
        yield request


DESCRIPTION = expert_pb2.DescribeResponse(
    worker="w1",
    incarnation="w1-9",
    experts=versions_to_proto(map(folder_version, BASE.model.addresses)),
    hidden_size=HIDDEN,
    device="cpu",
    weight_bytes=6000,
    contents_revision=2,
    available_bytes=14000,
)


@fuzzed("worker_descriptions", near(DESCRIPTION), examples=6)
def test_a_worker_that_describes_itself_wrongly_harms_no_other(raw: bytes) -> None:
    with world() as there:
        there.description = raw
        there.workers["w1"].start()
        there.pass_time(6.0)
        replicas = there.routers[0].told.table.replicas if there.routers[0].told else ()
        assert there.workers["w0"].replica in replicas


def published() -> control_pb2.WatchResponse:
    """One layer of three slots, a fourth of a bundle, and a trial."""
    versions = {ExpertAddress(0, slot): bytes([slot]) * 32 for slot in range(NUM_SLOTS + 1)}
    added = ExpertAddress(0, NUM_SLOTS)
    bundle = EpochBundle("maths", bytes(32), ("maths",), (added,))
    epochs = [
        Epoch.of(
            "tiny",
            versions | {added: digest * 32},
            gate_rows={added: GateRow(bytes(4 * HIDDEN))},
            bundles=[bundle],
        )
        for digest in (b"a", b"b")
    ]
    replica = Replica("w", "127.0.0.1:1", "1", epochs[0].expert_versions | epochs[1].expert_versions)
    return Snapshot(epochs[0], RoutingTable(7, (replica,)), Canary(epochs[1], 0.5, 0.1), 30.0).to_proto()


@fuzzed("snapshots", near(published()), examples=60)
def test_a_snapshot_is_used_by_a_router_or_refused(raw: bytes) -> None:
    message = parsed(control_pb2.WatchResponse, raw)
    if message is None:
        return
    book = EpochBook({0: LayerShape(NUM_SLOTS, 2)}, HIDDEN)
    with refusals():
        # Its content is what is looked at, so the ids are right.
        for epoch in (message.epoch, message.canary.epoch):
            if epoch.id:
                epoch.id = ""
                with contextlib.suppress(MoesaicError):
                    epoch.id = Epoch.from_proto(epoch).id
        snapshot = Snapshot.from_proto(message)
        book.update(snapshot)
        book.settle(lambda _: [], {})
        if book.current is not None:
            book.choose("r", "s", "", None)
        snapshot.to_proto().SerializeToString()

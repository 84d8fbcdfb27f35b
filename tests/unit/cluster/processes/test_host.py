"""A host: its server's states in order, told as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.processes.host import ProcessHost
from moesaic.errors import CheckpointError
from moesaic.v1 import control_pb2 as pb


class FakeServer:
    """A server that loads when it is let, and fails as often as it is told."""

    def __init__(self, failures: list[Exception], address: str = "127.0.0.1:1") -> None:
        self.failures = failures
        self.address = address
        self.loaded = asyncio.Event()
        self.loaded_bytes, self.total_bytes = 3, 10
        self.contents_revision = 0
        self.on_contents_change: Callable[[], object] = lambda: None
        self.stopped_with: list[float] = []

    async def start(self) -> str:
        return self.address

    async def load(self) -> None:
        await self.loaded.wait()
        if self.failures:
            raise self.failures.pop(0)

    async def stop(self, drain_s: float) -> None:
        self.stopped_with.append(drain_s)


def host_of(server: FakeServer, naps: list[float] | None = None) -> ProcessHost:
    async def make(on_contents_change: Callable[[], object]) -> FakeServer:
        server.on_contents_change = on_contents_change
        return server

    async def nap(seconds: float) -> None:
        assert naps is not None, "nothing fails here"
        naps.append(seconds)
        await asyncio.sleep(0)

    return ProcessHost("expert-worker-0", make, node="n", restarts=2, sleep=nap)


async def test_a_server_is_pending_then_loading_with_progress_then_ready() -> None:
    server = FakeServer([])
    host = host_of(server)
    before = await host.report(0, 1.0)
    assert (before.state, before.restarts) == (pb.PROCESS_STATE_PENDING, 2)
    running = asyncio.create_task(host.run())
    loading = await host.report(before.revision, 1.0)
    assert (loading.state, loading.address) == (pb.PROCESS_STATE_LOADING, "127.0.0.1:1")
    assert (loading.loaded_bytes, loading.total_bytes) == (3, 10)
    server.loaded.set()
    ready = await host.report(loading.revision, 1.0)
    assert ready.ready
    await running


async def test_a_server_on_every_address_is_reported_at_the_address_of_its_node() -> None:
    server = FakeServer([], address="0.0.0.0:1")
    server.loaded.set()
    host = host_of(server)
    await host.run()
    assert (await host.report(0, 1.0)).address == "n:1"


async def test_a_report_that_has_been_seen_is_held_until_the_time_is_over() -> None:
    host = host_of(FakeServer([]))
    first = await host.report(0, 1.0)
    assert await host.report(first.revision, 0.01) == first


async def test_a_failed_start_tells_the_reason_and_is_tried_again_with_longer_pauses() -> None:
    naps: list[float] = []
    server = FakeServer([CheckpointError("shard 2 is truncated"), MemoryError("no room"), OSError("again")])
    server.loaded.set()
    host = host_of(server, naps)
    seen = await host.report(0, 1.0)
    running = asyncio.create_task(host.run())
    while (seen := await host.report(seen.revision, 1.0)).state != pb.PROCESS_STATE_FAILED:
        pass
    assert seen.detail == "shard 2 is truncated"
    assert seen.address == ""
    await running
    assert naps == [1.0, 2.0, 4.0]
    assert (await host.report(0, 1.0)).ready
    assert server.stopped_with == [0.0, 0.0, 0.0]


async def test_an_unexpected_error_is_told_with_its_kind() -> None:
    server = FakeServer([MemoryError("no room")])
    server.loaded.set()
    naps: list[float] = []
    host = host_of(server, naps)
    details = []

    async def follow() -> None:
        seen = 0
        while not details:
            report = await host.report(seen, 1.0)
            seen = report.revision
            if report.detail:
                details.append(report.detail)

    await asyncio.gather(follow(), host.run())
    assert details == ["MemoryError: no room"]


async def test_new_contents_wake_whoever_waits_for_a_report() -> None:
    server = FakeServer([])
    server.loaded.set()
    host = host_of(server)
    await host.run()
    ready = await host.report(0, 1.0)
    waiting = asyncio.create_task(host.report(ready.revision, 60.0))
    await asyncio.sleep(0)
    server.contents_revision = 4
    await asyncio.to_thread(server.on_contents_change)
    changed = await waiting
    assert changed.ready and changed.revision > ready.revision
    assert (ready.contents_revision, changed.contents_revision) == (0, 4)


async def test_new_contents_are_reported_even_if_nobody_told_of_them() -> None:
    server = FakeServer([])
    server.loaded.set()
    host = host_of(server)
    await host.run()
    ready = await host.report(0, 1.0)
    server.contents_revision = 4
    changed = await host.report(ready.revision, 60.0)
    assert changed.ready and changed.contents_revision == 4


async def test_contents_that_are_told_of_without_a_change_are_no_news() -> None:
    server = FakeServer([])
    server.loaded.set()
    host = host_of(server)
    await host.run()
    ready = await host.report(0, 1.0)
    await asyncio.to_thread(server.on_contents_change)
    assert await host.report(ready.revision, 0.01) == ready


async def test_stopping_drains_the_server() -> None:
    server = FakeServer([])
    server.loaded.set()
    host = host_of(server)
    await host.run()
    await host.stop(5.0)
    assert server.stopped_with == [5.0]
    assert (await host.report(0, 1.0)).state == pb.PROCESS_STATE_STOPPED


async def test_a_host_that_never_started_stops_too() -> None:
    host = host_of(FakeServer([]))
    await host.stop(0.0)
    assert (await host.report(0, 1.0)).state == pb.PROCESS_STATE_STOPPED


pytestmark = pytest.mark.timeout(300)

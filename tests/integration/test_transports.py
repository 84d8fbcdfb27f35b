"""A link and real workers: every way gives the same bits, and whatever happens to one of them, the calls go on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral
from support.expert_calls import compute_request
from support.processes import Process, running_router, running_workers

from moesaic import rpc
from moesaic.client import SyncClient
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports.base import DIRECT, GRPC, LANE, Transport, Way
from router.workers.transports.choice import WayTrial
from router.workers.transports.direct_stream import MAX_ROWS_BYTES
from router.workers.transports.negotiate import open_ways
from router.workers.worker_link import OpenWays, PendingCall, WorkerLink

WAIT_S = 20.0
HIDDEN = torch.randn(100, 32, generator=torch.Generator().manual_seed(3))
LARGE = torch.randn(MAX_ROWS_BYTES // 128 + 1, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "tiny")


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """A pass takes long enough to be met in the middle."""
    sizes = {"intermediate_size": 16384, "num_local_experts": 2, "num_hidden_layers": 1}
    return write_mixtral(tmp_path / "slow", **sizes)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[Way], None]:
    """Tells all trials which way is the fastest, so that no test depends on the machine."""
    observe = WayTrial.observe

    def choose(fastest: Way) -> None:
        def told(trial: WayTrial, way: Way, _overhead_s: float) -> None:
            observe(trial, way, 1e-4 if way == fastest else 4e-4)

        monkeypatch.setattr(WayTrial, "observe", told)

    return choose


def replica_of(worker: Process) -> Replica:
    with rpc.channel(worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        described = stub.Describe(expert_pb2.DescribeRequest(), timeout=WAIT_S)
    return Replica.from_description(worker.address, described)


ALL_WAYS = partial(open_ways, use_lane=True, use_direct=True)


@contextmanager
def linked(replica: Replica, opening: OpenWays = ALL_WAYS) -> Iterator[WorkerLink]:
    link = WorkerLink(replica, open_ways=opening)
    try:
        yield link
    finally:
        link.close()


def send(link: WorkerLink, hidden: torch.Tensor = HIDDEN) -> PendingCall:
    """A call for two experts."""
    every_row = list(range(len(hidden)))
    request = compute_request(hidden, {0: every_row, 1: every_row[:2]}, dict(link.replica.holdings))
    request.hidden.ClearField("data")
    return link.send(request, hidden)


def ask(link: WorkerLink, hidden: torch.Tensor = HIDDEN) -> torch.Tensor:
    return link.receive(send(link, hidden), WAIT_S).output.clone()


def ask_until(link: WorkerLink, way: Way) -> None:
    """Ways are opened in the background and tried in turn."""
    run, ends_s = 0, time.monotonic() + WAIT_S
    while run < 4:
        assert time.monotonic() < ends_s, f"never chosen: {way}"
        ask(link)
        run = run + 1 if link.traffic.transport == way else 0


@pytest.mark.parametrize("way", [DIRECT, LANE])
def test_all_ways_give_the_same_bits_and_the_one_measured_fastest_is_taken(
    model: Path, way: Way, fastest: Callable[[Way], None]
) -> None:
    fastest(way)
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker)) as link:
        over_grpc = ask(link)
        assert link.traffic.transport == GRPC
        ask_until(link, way)
        assert torch.equal(ask(link), over_grpc)
        assert link.traffic.failed_calls == link.num_in_flight == 0
        assert worker.stop() == 0
    assert "Traceback" not in worker.log


def test_a_direct_stream_that_breaks_in_the_middle_of_calls_costs_no_answer(
    slow_model: Path, fastest: Callable[[Way], None]
) -> None:
    fastest(DIRECT)
    opened: dict[Way, Transport] = {}

    def open_direct(stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica) -> dict[Way, Transport]:
        opened.update(open_ways(stub, replica, use_lane=False, use_direct=True))
        return opened

    with (
        running_workers(slow_model, ["all"]) as (worker,),
        linked(replica_of(worker), open_direct) as link,
    ):
        over_grpc = ask(link)
        ask_until(link, DIRECT)
        calls = [send(link) for _ in range(4)]
        opened[DIRECT].close()
        for call in calls:
            assert torch.equal(link.receive(call, WAIT_S).output, over_grpc)
        ask(link)
        assert link.traffic.transport == GRPC and link.traffic.failed_calls == 0


def test_a_worker_killed_in_the_middle_of_calls_fails_them_at_once(
    slow_model: Path, fastest: Callable[[Way], None]
) -> None:
    fastest(DIRECT)
    with running_workers(slow_model, ["all"]) as (worker,), linked(replica_of(worker)) as link:
        ask_until(link, DIRECT)
        calls = [send(link) for _ in range(8)]
        worker.kill()
        killed_s = time.monotonic()
        for call in calls[:-1]:
            with suppress(Unavailable):
                link.receive(call, WAIT_S)
        with pytest.raises(Unavailable):
            link.receive(calls[-1], WAIT_S)
        assert time.monotonic() - killed_s < WAIT_S / 2
        assert link.num_in_flight == 0


def test_a_worker_that_stands_still_ends_a_call_at_its_deadline_and_keeps_its_way(
    model: Path, fastest: Callable[[Way], None]
) -> None:
    fastest(DIRECT)
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker)) as link:
        ask_until(link, DIRECT)
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            late = send(link)
            with pytest.raises(TimeoutError):
                link.receive(late, 0.2)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        assert len(ask(link)) == len(HIDDEN) + 2
        assert link.traffic.transport == DIRECT and link.traffic.failed_calls == 1


def test_large_calls_go_over_grpc_beside_small_ones_over_the_direct_stream(
    model: Path, fastest: Callable[[Way], None]
) -> None:
    fastest(DIRECT)
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker)) as link:
        ask_until(link, DIRECT)
        first = ask(link, LARGE)
        for _ in range(60):
            assert torch.equal(ask(link, LARGE), first)
            assert link.traffic.transport != DIRECT
            ask(link)
            assert link.traffic.transport == DIRECT


def test_a_port_that_a_firewall_shuts_leaves_grpc(model: Path, fastest: Callable[[Way], None]) -> None:
    fastest(DIRECT)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        shut = listening.getsockname()[1]

    class BehindFirewall:
        def __init__(self, stub: expert_pb2_grpc.ExpertServiceStub) -> None:
            self._stub = stub

        def OpenLane(
            self, request: expert_pb2.OpenLaneRequest, timeout: float
        ) -> expert_pb2.OpenLaneResponse:
            opened: expert_pb2.OpenLaneResponse = self._stub.OpenLane(request, timeout=timeout)
            assert opened.compute_port
            opened.compute_port = shut
            return opened

    results: list[dict[Way, Transport]] = []
    tried = threading.Event()

    def open_shut(stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica) -> dict[Way, Transport]:
        results.append(open_ways(BehindFirewall(stub), replica, use_lane=False, use_direct=True))  # type: ignore[arg-type]
        tried.set()
        return results[0]

    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker), open_shut) as link:
        ask(link)
        assert tried.wait(WAIT_S) and results == [{}]
        for _ in range(50):
            ask(link)
            assert link.traffic.transport == GRPC
        assert link.traffic.failed_calls == 0


def test_a_router_gives_the_same_tokens_over_the_direct_stream_and_without(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_ENGINE__SHARED_MEMORY", "off")
    tokens, direct_calls = [], []
    for switch in ("off", "auto"):
        monkeypatch.setenv("MOESAIC_ENGINE__DIRECT_STREAM", switch)
        with running_workers(model, ["0-1", "2-3"]) as workers, running_router(model, workers) as router:
            with SyncClient(router.address) as client:
                answer = client.complete([90, 91, 92, 17], max_tokens=48, temperature=0)
                tokens.append(answer.token_ids)
            with rpc.channel(workers[0].address) as channel:
                stub = expert_pb2_grpc.ExpertServiceStub(channel)
                stats = stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=WAIT_S)
                direct_calls.append(stats.direct_calls)
    assert tokens[0] == tokens[1]
    assert direct_calls[0] == 0 and direct_calls[1] > 0

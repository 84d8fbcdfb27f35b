"""A link and real workers: every transport gives the same bits, and whatever happens to one of them, the calls go on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral
from support.expert_calls import compute_request
from support.processes import Process, running_router, running_workers

from moesaic import rpc
from moesaic.client.sync_client import SyncClient
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, Transport, TransportKind
from router.workers.transports.direct_stream import MAX_ROWS_BYTES
from router.workers.transports.negotiate import open_transports
from router.workers.worker_link import OpenTransports, PendingCall, WorkerLink

WAIT_S = 120.0
# Within this time a caller is told of a worker that was killed.
KILL_NOTICED_S = 60.0
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


def replica_of(worker: Process) -> Replica:
    with rpc.channel(worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        described = stub.Describe(expert_pb2.DescribeRequest(), timeout=WAIT_S)
    return Replica.from_description(worker.address, described)


ALL = partial(open_transports, use_shared_memory=True, use_direct=True)
DIRECT_ONLY = partial(open_transports, use_shared_memory=False, use_direct=True)
SHARED_MEMORY_ONLY = partial(open_transports, use_shared_memory=True, use_direct=False)


@contextmanager
def linked(replica: Replica, opening: OpenTransports) -> Iterator[WorkerLink]:
    link = WorkerLink(replica, open_transports=opening)
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


def ask_until(link: WorkerLink, kind: TransportKind) -> None:
    """Transports are opened in the background after the first answer."""
    ends_s = time.monotonic() + WAIT_S
    while link.traffic.transport != kind:
        assert time.monotonic() < ends_s, f"never taken: {kind}"
        ask(link)


@pytest.mark.parametrize(
    ("opening", "kind"), [(ALL, SHARED_MEMORY), (SHARED_MEMORY_ONLY, SHARED_MEMORY), (DIRECT_ONLY, DIRECT)]
)
def test_all_transports_give_the_same_bits_and_the_first_in_the_order_is_taken(
    model: Path, opening: OpenTransports, kind: TransportKind
) -> None:
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker), opening) as link:
        over_grpc = ask(link)
        assert link.traffic.transport == GRPC
        ask_until(link, kind)
        for _ in range(8):
            assert torch.equal(ask(link), over_grpc)
            assert link.traffic.transport == kind
        assert link.traffic.failed_calls == link.num_in_flight == 0
        assert worker.stop() == 0
    assert "Traceback" not in worker.log


def test_transports_that_break_in_the_middle_of_calls_cost_no_answer_and_the_next_one_is_taken(
    slow_model: Path,
) -> None:
    opened: dict[TransportKind, Transport] = {}

    def open_all(stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica) -> dict[TransportKind, Transport]:
        opened.update(ALL(stub, replica))
        return opened

    with (
        running_workers(slow_model, ["all"]) as (worker,),
        linked(replica_of(worker), open_all) as link,
    ):
        over_grpc = ask(link)
        ask_until(link, SHARED_MEMORY)
        for breaking, following in ((SHARED_MEMORY, DIRECT), (DIRECT, GRPC)):
            calls = [send(link) for _ in range(4)]
            assert link.traffic.transport == breaking
            opened[breaking].close()
            for call in calls:
                assert torch.equal(link.receive(call, WAIT_S).output, over_grpc)
            ask(link)
            assert link.traffic.transport == following
        assert link.traffic.failed_calls == link.num_in_flight == 0


def test_a_worker_killed_in_the_middle_of_calls_fails_them_at_once(
    slow_model: Path,
) -> None:
    with running_workers(slow_model, ["all"]) as (worker,), linked(replica_of(worker), DIRECT_ONLY) as link:
        ask_until(link, DIRECT)
        calls = [send(link) for _ in range(8)]
        worker.kill()
        killed_s = time.monotonic()
        for call in calls[:-1]:
            with suppress(Unavailable):
                link.receive(call, WAIT_S)
        with pytest.raises(Unavailable):
            link.receive(calls[-1], WAIT_S)
        assert time.monotonic() - killed_s < KILL_NOTICED_S
        assert link.num_in_flight == 0


def test_a_worker_that_stands_still_ends_a_call_at_its_deadline_and_keeps_its_transport(
    model: Path,
) -> None:
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker), DIRECT_ONLY) as link:
        ask_until(link, DIRECT)
        worker.stand_still()
        try:
            late = send(link)
            with pytest.raises(TimeoutError):
                link.receive(late, 0.2)
        finally:
            worker.go_on()
        assert len(ask(link)) == len(HIDDEN) + 2
        assert link.traffic.transport == DIRECT and link.traffic.failed_calls == 1


def test_large_calls_go_over_grpc_beside_small_ones_over_the_direct_stream(
    model: Path,
) -> None:
    with running_workers(model, ["all"]) as (worker,), linked(replica_of(worker), DIRECT_ONLY) as link:
        ask_until(link, DIRECT)
        first = ask(link, LARGE)
        for _ in range(60):
            assert torch.equal(ask(link, LARGE), first)
            assert link.traffic.transport != DIRECT
            ask(link)
            assert link.traffic.transport == DIRECT


def test_a_port_that_a_firewall_shuts_leaves_grpc(
    model: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        shut = listening.getsockname()[1]

    class BehindFirewall:
        def __init__(self, stub: expert_pb2_grpc.ExpertServiceStub) -> None:
            self._stub = stub

        def OpenTransports(
            self, request: expert_pb2.OpenTransportsRequest, timeout: float
        ) -> expert_pb2.OpenTransportsResponse:
            opened: expert_pb2.OpenTransportsResponse = self._stub.OpenTransports(request, timeout=timeout)
            assert opened.direct_port
            opened.direct_port = shut
            return opened

    results: list[dict[TransportKind, Transport]] = []
    tried = threading.Event()

    def open_shut(
        stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica
    ) -> dict[TransportKind, Transport]:
        results.append(
            open_transports(BehindFirewall(stub), replica, use_shared_memory=False, use_direct=True)
        )  # type: ignore[arg-type]
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
                for _ in range(20):  # the stream is opened beside the first calls
                    answer = client.complete([90, 91, 92, 17], max_tokens=48, temperature=0)
                    tokens.append(answer.token_ids)
                    if switch == "off" or num_direct_calls(workers[0]):
                        break
            direct_calls.append(num_direct_calls(workers[0]))
    assert len(set(tokens)) == 1
    assert direct_calls[0] == 0 and direct_calls[1] > 0


def num_direct_calls(worker: Process) -> int:
    with rpc.channel(worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        stats = stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=WAIT_S)
        num_calls: int = stats.direct_calls
        return num_calls

"""Shared memory between real processes: as exact as gRPC, as safe when either side dies, and gone without a trace."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_mixtral
from support.expert_calls import compute_request
from support.processes import Process, running_router, running_workers
from support.wire_tensors import from_wire

from moesaic import rpc
from moesaic.client.sync_client import SyncClient
from moesaic.epoch import ExpertAddress, versions_from_proto
from moesaic.errors import MoesaicError, Unavailable
from moesaic.routing_table import Replica
from moesaic.transports import shared_memory
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports.base import SHARED_MEMORY
from router.workers.transports.negotiate import open_transports
from router.workers.transports.shared_memory import SharedMemoryTransport

WAIT_S = 60.0
HIDDEN = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True, slots=True)
class Caller:
    """The connections to one worker, as a router has them."""

    stub: Any
    described: expert_pb2.DescribeResponse

    @property
    def versions(self) -> dict[ExpertAddress, bytes]:
        return dict(versions_from_proto(self.described.experts))

    def path(self, **changes: Any) -> str:
        request = expert_pb2.OpenTransportsRequest(
            **{"host_id": shared_memory.host_id(), "shared_memory_version": shared_memory.VERSION} | changes
        )
        return str(self.stub.OpenTransports(request, timeout=WAIT_S).socket_path)

    def link(self) -> SharedMemoryTransport:
        link = self.enter(self.described.incarnation)
        assert link is not None
        return link

    def enter(self, incarnation: str) -> SharedMemoryTransport | None:
        replica = Replica(self.described.worker, "unused", incarnation, frozenset())
        link = open_transports(self.stub, replica, use_shared_memory=True, use_direct=False).get(
            SHARED_MEMORY
        )
        assert link is None or isinstance(link, SharedMemoryTransport)
        return link

    def stats(self) -> expert_pb2.GetWorkerStatsResponse:
        stats: expert_pb2.GetWorkerStatsResponse = self.stub.GetWorkerStats(
            expert_pb2.GetWorkerStatsRequest(), timeout=WAIT_S
        )
        return stats


@contextmanager
def calling(worker: Process) -> Iterator[Caller]:
    with rpc.channel(worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        yield Caller(stub, stub.Describe(expert_pb2.DescribeRequest(), timeout=WAIT_S))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "tiny")


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """Its passes of a thousand rows take long enough to be met in the middle."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_local_experts": 2, "num_hidden_layers": 1}
    return write_mixtral(tmp_path / "slow", **sizes)


def send(link: SharedMemoryTransport, request: expert_pb2.ComputeRequest) -> None:
    hidden = torch.frombuffer(bytearray(request.hidden.data), dtype=torch.uint8)
    request.hidden.ClearField("data")
    link.send(request, hidden)


def send_much(link: SharedMemoryTransport, caller: Caller, num_calls: int) -> None:
    hidden, every_row = torch.randn(1024, 256), list(range(1024))
    for call_id in range(num_calls):
        send(
            link,
            compute_request(hidden, {0: every_row, 1: every_row}, caller.versions, call_id=call_id),
        )


def test_both_ways_give_the_same_bits(model: Path) -> None:
    with running_workers(model, ["all"]) as (worker,), calling(worker) as caller:
        link = caller.link()
        for call_id, rows in enumerate(({0: [0, 2], 3: [1]}, {1: list(range(7)), 2: [6]}, {2: [5]})):
            request = compute_request(HIDDEN, rows, caller.versions, layer=call_id % 2, call_id=call_id)
            over_grpc = next(caller.stub.Compute(iter([request]), timeout=WAIT_S))
            send(link, request)
            over_shared_memory = link.receive(call_id, WAIT_S)
            assert torch.equal(over_shared_memory.output, from_wire(over_grpc.output))
            assert over_shared_memory.response.versions == over_grpc.versions
            assert over_shared_memory.response.epoch == over_grpc.epoch
        stats = caller.stats()
        assert (stats.calls, stats.shared_memory_calls, stats.passes) == (6, 3, 6)
        link.close()
        assert worker.stop() == 0
    assert "Traceback" not in worker.log


def test_only_a_caller_of_this_host_and_version_gets_shared_memory_and_only_where_it_is_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_WORKER__SHARED_MEMORY", "off")
    with running_workers(model, ["all"]) as (without,), calling(without) as other:
        monkeypatch.delenv("MOESAIC_WORKER__SHARED_MEMORY")
        with running_workers(model, ["all"]) as (worker,), calling(worker) as caller:
            path = Path(caller.path())
            assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert caller.path(host_id="another") == caller.path(shared_memory_version=99) == ""
            assert other.path() == "" and other.enter(other.described.incarnation) is None
            assert caller.enter("another incarnation") is None


def test_nothing_is_left_in_the_temporary_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with running_workers(model, ["all"]) as (worker,), calling(worker) as caller:
        assert Path(caller.path()).is_relative_to(folder)
        link = caller.link()
        assert worker.stop() == 0
        assert not list(folder.iterdir())
        send(link, compute_request(HIDDEN, {0: [0]}, caller.versions))
        with pytest.raises(Unavailable):
            link.receive(1, WAIT_S)
        link.close()


def test_a_worker_killed_in_the_middle_of_a_call_fails_it_at_once(slow_model: Path) -> None:
    with running_workers(slow_model, ["all"]) as (worker,), calling(worker) as caller:
        link = caller.link()
        send_much(link, caller, 8)
        link.receive(0, WAIT_S)
        worker.kill()
        killed_s = time.monotonic()
        lost = 0
        for call_id in range(1, 8):
            with suppress(Unavailable):
                link.receive(call_id, WAIT_S)
                continue
            lost += 1
        assert lost and time.monotonic() - killed_s < WAIT_S / 2
        assert link.broken
        link.close()


def test_a_worker_that_stops_answers_what_it_took(slow_model: Path) -> None:
    with running_workers(slow_model, ["all"]) as (worker,), calling(worker) as caller:
        link = caller.link()
        send_much(link, caller, 8)
        stopping = threading.Thread(target=worker.stop)
        link.receive(0, WAIT_S)
        stopping.start()
        ended = [_end(link, call_id) for call_id in range(1, 8)]
        stopping.join(WAIT_S)
        assert set(ended) <= {"answered", "Unavailable"}, ended
        link.close()
    assert "Traceback" not in worker.log


def _end(link: SharedMemoryTransport, call_id: int) -> str:
    try:
        link.receive(call_id, WAIT_S)
    except MoesaicError as error:
        return type(error).__name__
    return "answered"


def test_a_router_that_goes_in_the_middle_leaves_the_worker_to_the_others(slow_model: Path) -> None:
    with running_workers(slow_model, ["all"]) as (worker,), calling(worker) as caller:
        staying, gone = caller.link(), caller.link()
        send_much(gone, caller, 8)
        gone.receive(0, WAIT_S)
        gone.close()
        send_much(staying, caller, 1)
        assert staying.receive(0, WAIT_S).output.shape == (2048, 256)
        assert caller.stats().calls < 9, "what the other one had asked for was dropped"
        staying.close()


def test_two_routers_share_a_worker_and_get_their_own_rows(model: Path) -> None:
    with running_workers(model, ["all"]) as (worker,), calling(worker) as caller:
        versions = caller.versions
        failures: list[str] = []

        def route(seed: int) -> None:
            link = caller.link()
            for call_id in range(1, 101):
                rows = {slot: [(seed + call_id + slot) % 7] for slot in range(4)}
                hidden = HIDDEN + seed
                request = compute_request(hidden, rows, versions, layer=call_id % 2, call_id=call_id)
                expected = next(caller.stub.Compute(iter([request]), timeout=WAIT_S))
                send(link, request)
                output = link.receive(call_id, WAIT_S).output
                if not torch.allclose(output, from_wire(expected.output), atol=1e-5, rtol=1e-5):
                    failures.append(f"router {seed}, call {call_id}")
            link.close()

        routers = [threading.Thread(target=route, args=(seed,)) for seed in (1, 2)]
        for router in routers:
            router.start()
        for router in routers:
            router.join(60.0)
        assert not failures
        assert caller.stats().shared_memory_calls == 200


def test_a_router_gives_the_same_tokens_over_shared_memory_and_without(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, shared_memory_calls = [], []
    for switch in ("off", "auto"):
        monkeypatch.setenv("MOESAIC_ENGINE__SHARED_MEMORY", switch)
        with running_workers(model, ["0-1", "2-3"]) as workers, running_router(model, workers) as router:
            with SyncClient(router.address) as client:
                answer = client.complete([90, 91, 92, 17], max_tokens=48, temperature=0)
                tokens.append(answer.token_ids)
            with calling(workers[0]) as caller:
                shared_memory_calls.append(caller.stats().shared_memory_calls)
    assert tokens[0] == tokens[1]
    assert shared_memory_calls[0] == 0 and shared_memory_calls[1] > 0

"""The stream to a worker over a real socket: pairing, breaking, coming back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import torch

from moesaic.errors import DataLoss, Overloaded, Unavailable, to_status
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire.tensors import data_of, header_of
from router.workers.transports.base import (
    DIRECT,
    GRPC,
    HOST_SILENT,
    SHARED_MEMORY,
    TransportKind,
    WorkerAnswer,
)
from router.workers.transports.direct_stream import MAX_ROWS_BYTES
from router.workers.worker_link import PendingCall, WorkerLink

WAIT_S = 60.0


class Worker(expert_pb2_grpc.ExpertServiceServicer):
    """Answers by layer: 0 at once, 1 after the next call, 2 with a refusal, 3 never, 4 by breaking the stream, 5 with
    rows that are cut short, 6 with an empty message, 7 for a call that nobody made."""

    def Compute(
        self, requests: Iterator[expert_pb2.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.ComputeResponse]:
        held: list[expert_pb2.ComputeResponse] = []
        for request in requests:
            response = expert_pb2.ComputeResponse(
                call_id=request.call_id, epoch=request.epoch, output=request.hidden
            )
            if request.layer == 0:
                yield response
                yield from held
                held.clear()
            elif request.layer == 1:
                held.append(response)
            elif request.layer == 2:
                response.ClearField("output")
                response.error.CopyFrom(to_status(Overloaded("full", retry_after_s=0.5)))
                yield response
            elif request.layer == 5:
                response.output.data = response.output.data[:-1]
                yield response
            elif request.layer == 6:
                yield expert_pb2.ComputeResponse()
            elif request.layer == 7:
                response.call_id += 1000
                yield response
            elif request.layer == 4:
                context.abort(grpc.StatusCode.UNAVAILABLE, "going away")


def serve(port: int = 0) -> tuple[grpc.Server, int]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(Worker(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


@pytest.fixture
def server() -> Iterator[tuple[grpc.Server, int]]:
    started = serve()
    yield started
    started[0].stop(0).wait(WAIT_S)


@pytest.fixture
def link(server: tuple[grpc.Server, int]) -> Iterator[WorkerLink]:
    made = WorkerLink(Replica("a", f"127.0.0.1:{server[1]}", "a-1", frozenset()))
    yield made
    made.close()


ROWS = torch.arange(6.0).view(2, 3)


def send(link: WorkerLink, layer: int, epoch: str = "") -> PendingCall:
    return link.send(expert_pb2.ComputeRequest(layer=layer, epoch=epoch, hidden=header_of(ROWS)), ROWS)


def test_answers_find_their_calls_in_whatever_order_they_come(link: WorkerLink) -> None:
    slow, quick = send(link, 1, "slow"), send(link, 0, "quick")
    assert link.receive(quick, WAIT_S).response.epoch == "quick"
    assert link.receive(slow, WAIT_S).response.epoch == "slow"
    assert link.connected and link.num_in_flight == 0


def test_a_refusal_is_raised_with_its_details_and_the_stream_goes_on(link: WorkerLink) -> None:
    with pytest.raises(Overloaded) as refused:
        link.receive(send(link, 2), WAIT_S)
    assert refused.value.retry_after_s == 0.5
    assert link.receive(send(link, 0), WAIT_S)


def test_a_late_answer_is_dropped(link: WorkerLink) -> None:
    late = send(link, 1)
    with pytest.raises(TimeoutError):
        link.receive(late, 0.05)
    assert link.num_in_flight == 0
    link.receive(send(link, 0), WAIT_S)  # brings the late answer along, for nobody
    assert link.traffic.failed_calls == 1


def test_a_broken_stream_fails_what_is_in_flight_and_the_next_call_opens_a_new_one(link: WorkerLink) -> None:
    waiting, breaking = send(link, 3), send(link, 4)
    for lost in (waiting, breaking):
        with pytest.raises(Unavailable):
            link.receive(lost, WAIT_S)
    assert link.receive(send(link, 0), WAIT_S)


def test_a_worker_that_died_is_noticed_at_once_and_found_again(
    server: tuple[grpc.Server, int], link: WorkerLink
) -> None:
    waiting = send(link, 3)
    server[0].stop(0).wait(WAIT_S)
    with pytest.raises(Unavailable):
        link.receive(waiting, WAIT_S)
    again, _ = serve(server[1])
    try:
        answered = threading.Event()
        for _ in range(600):
            try:
                link.receive(send(link, 0), WAIT_S)
                answered.set()
                break
            except Unavailable:
                answered.wait(0.1)
        assert answered.is_set()
    finally:
        again.stop(0).wait(WAIT_S)


def test_a_closed_link_refuses(link: WorkerLink) -> None:
    link.close()
    with pytest.raises(Unavailable):
        link.receive(send(link, 0), WAIT_S)


class FakeTransport:
    """A transport that answers in the test, with its name for an epoch, until it breaks."""

    def __init__(self, name: TransportKind) -> None:
        self.broken = self.closed = self.breaks_with_next_call = False
        self.num_in_flight = 0
        self.reason = ""
        self._name = name

    def send(self, request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> None:
        self.num_in_flight += 1
        self.broken = self.broken or self.breaks_with_next_call
        self._request, self._hidden = request, hidden

    def receive(self, call_id: int, timeout_s: float) -> WorkerAnswer:
        self.num_in_flight -= 1
        if self.broken:
            raise DataLoss("the transport broke", reason=self.reason)
        response = expert_pb2.ComputeResponse(call_id=call_id, epoch=self._name, output=self._request.hidden)
        return WorkerAnswer(response, data_of(self._hidden))

    def close(self) -> None:
        self.broken = self.closed = True


@pytest.fixture
def transports() -> dict[TransportKind, FakeTransport]:
    """Those that `fast_link` opens."""
    return {kind: FakeTransport(kind) for kind in (DIRECT, SHARED_MEMORY)}


@pytest.fixture
def fast_link(
    server: tuple[grpc.Server, int], transports: dict[TransportKind, FakeTransport]
) -> Iterator[WorkerLink]:
    asked: list[str] = []

    def open_transports(_stub: object, replica: Replica) -> dict[TransportKind, FakeTransport]:
        asked.append(replica.incarnation)
        return transports

    made = WorkerLink(
        Replica("a", f"127.0.0.1:{server[1]}", "a-1", frozenset()), open_transports=open_transports
    )
    yield made
    made.close()
    assert asked == ["a-1"] and all(transport.closed for transport in transports.values())


def ask(link: WorkerLink, rows: torch.Tensor = ROWS) -> str:
    """The epoch of an answer: its fake transport, or nothing."""
    request = expert_pb2.ComputeRequest(hidden=header_of(rows))
    return link.receive(link.send(request, rows), WAIT_S).response.epoch


def ask_until_opened(link: WorkerLink) -> None:
    """Transports are opened in the background after the first answer."""
    for _ in range(10_000):
        if ask(link) == SHARED_MEMORY:
            return
    raise AssertionError("never opened")


def test_calls_go_over_shared_memory_once_it_is_open(fast_link: WorkerLink) -> None:
    ask_until_opened(fast_link)
    assert [ask(fast_link) for _ in range(8)] == [SHARED_MEMORY] * 8
    assert fast_link.traffic.transport == SHARED_MEMORY and fast_link.connected


def test_a_call_whose_transport_breaks_is_answered_over_the_next_one_which_the_later_calls_take(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    ask_until_opened(fast_link)
    for broken, following, epoch in ((SHARED_MEMORY, DIRECT, DIRECT), (DIRECT, GRPC, "as asked")):
        in_flight = send(fast_link, 0, "as asked")
        assert fast_link.traffic.transport == broken and fast_link.num_in_flight == 1
        transports[broken].broken = True
        assert fast_link.receive(in_flight, WAIT_S).response.epoch == epoch
        assert transports[broken].closed
        ask(fast_link)
        assert fast_link.traffic.transport == following
    assert fast_link.traffic.failed_calls == 0


def test_a_call_goes_again_over_every_transport_in_turn(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    ask_until_opened(fast_link)
    in_flight = send(fast_link, 0, "as asked")
    transports[SHARED_MEMORY].broken = True
    transports[DIRECT].breaks_with_next_call = True
    assert fast_link.receive(in_flight, WAIT_S).response.epoch == "as asked"
    assert fast_link.traffic.transport == GRPC
    assert fast_link.traffic.failed_calls == fast_link.num_in_flight == 0


def test_a_large_call_whose_shared_memory_breaks_goes_again_over_grpcio(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    ask_until_opened(fast_link)
    large = torch.zeros(2, MAX_ROWS_BYTES // 8 + 1)
    in_flight = fast_link.send(expert_pb2.ComputeRequest(hidden=header_of(large)), large)
    transports[SHARED_MEMORY].broken = True
    assert fast_link.receive(in_flight, WAIT_S).response.epoch == ""
    assert fast_link.traffic.transport == GRPC
    assert ask(fast_link) == DIRECT


def test_a_call_whose_transport_breaks_when_its_time_is_over_is_not_sent_again(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    ask_until_opened(fast_link)
    in_flight = send(fast_link, 0)
    transports[SHARED_MEMORY].broken = True
    with pytest.raises(DataLoss, match="the transport broke"):
        fast_link.receive(in_flight, 0.0)
    assert fast_link.num_in_flight == 0


def test_a_call_whose_host_is_silent_is_not_sent_again_and_an_answer_opens_the_transports_anew(
    server: tuple[grpc.Server, int],
) -> None:
    opened: list[FakeTransport] = []

    def open_transports(_stub: object, _replica: Replica) -> dict[TransportKind, FakeTransport]:
        opened.append(FakeTransport(DIRECT))
        return {DIRECT: opened[-1]}

    link = WorkerLink(
        Replica("a", f"127.0.0.1:{server[1]}", "a-1", frozenset()), open_transports=open_transports
    )
    try:
        for silent in range(2):
            while ask(link) != DIRECT:
                pass
            assert len(opened) == silent + 1
            in_flight = send(link, 0)
            opened[-1].broken, opened[-1].reason = True, HOST_SILENT
            with pytest.raises(DataLoss):
                link.receive(in_flight, WAIT_S)
            assert opened[-1].closed
    finally:
        link.close()


def test_a_transport_that_broke_between_calls_is_not_taken(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    ask_until_opened(fast_link)
    transports[SHARED_MEMORY].broken = True
    assert ask(fast_link) == DIRECT


def test_large_calls_never_go_over_the_direct_stream(
    fast_link: WorkerLink, transports: dict[TransportKind, FakeTransport]
) -> None:
    large = torch.zeros(2, MAX_ROWS_BYTES // 8 + 1)
    ask_until_opened(fast_link)
    transports[SHARED_MEMORY].broken = True
    for _ in range(100):
        assert ask(fast_link, large) == ""
        assert fast_link.traffic.transport == GRPC
        assert ask(fast_link) == DIRECT


def test_large_calls_go_over_shared_memory(fast_link: WorkerLink) -> None:
    ask_until_opened(fast_link)
    assert ask(fast_link, torch.zeros(2, MAX_ROWS_BYTES // 8 + 1)) == SHARED_MEMORY


def test_a_closed_link_takes_none_of_the_transports(fast_link: WorkerLink) -> None:
    ask_until_opened(fast_link)
    fast_link.close()
    with pytest.raises(Unavailable):
        ask(fast_link)


def test_the_latency_of_the_last_calls_is_known(link: WorkerLink) -> None:
    assert link.traffic.latency_us(0.5) == 0
    for _ in range(5):
        link.receive(send(link, 0), WAIT_S)
    assert 0 < link.traffic.latency_us(0.5) <= link.traffic.latency_us(0.99)
    assert (
        link.traffic.calls == 5 and link.traffic.sent_bytes == link.traffic.received_bytes == 5 * ROWS.nbytes
    )


def test_an_answer_whose_bytes_are_not_those_of_its_shape_is_data_loss(link: WorkerLink) -> None:
    with pytest.raises(DataLoss):
        link.receive(send(link, 5), WAIT_S)


@pytest.mark.parametrize("layer", [6, 7])
def test_an_answer_that_belongs_to_no_call_is_data_loss_at_once_and_the_next_call_opens_a_new_stream(
    link: WorkerLink, layer: int
) -> None:
    link.receive(send(link, 0), WAIT_S)
    for call in (send(link, layer), send(link, 3)):
        with pytest.raises(DataLoss, match="never made"):
            link.receive(call, WAIT_S)
    assert link.receive(send(link, 0), WAIT_S)


def test_waiting_leaves_a_call_as_it_is_and_an_abandoned_one_is_no_failure(link: WorkerLink) -> None:
    late, quick = send(link, 1), send(link, 0)
    assert not link.wait(late, 0.0) and link.num_in_flight == 2
    assert link.wait(quick, WAIT_S) and link.receive(quick, 0.0)
    link.abandon(late)
    assert link.num_in_flight == link.traffic.failed_calls == 0
    link.receive(send(link, 0), WAIT_S)


def test_a_probe_travels_beside_the_calls(link: WorkerLink) -> None:
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    waiting = send(link, 1)
    for layer in (0, 2, 3, 4):
        request = expert_pb2.ComputeRequest(layer=layer, hidden=header_of(ROWS))
        link.probe(request, ROWS, 0.5, outcomes.put)
        expected = {0: WorkerAnswer, 2: Overloaded, 3: Unavailable, 4: Unavailable}[layer]
        assert isinstance(outcomes.get(timeout=WAIT_S), expected)
    assert link.receive(send(link, 0), WAIT_S) and link.receive(waiting, WAIT_S)
    assert link.traffic.calls == 2
    link.close()
    link.probe(request, ROWS, 0.5, outcomes.put)
    assert isinstance(outcomes.get(timeout=WAIT_S), Unavailable)

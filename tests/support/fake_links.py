"""Workers that live in the test: a link that computes at once, and can be told to misbehave.

Expert (layer, slot) multiplies a row by slot + 1, so that expected results are plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from moesaic.errors import MoesaicError
from moesaic.manifest import Epoch, ExpertAddress
from moesaic.routing_table import Replica, RoutingTable
from moesaic.tensors import from_wire, to_wire
from moesaic.v1 import expert_pb2
from router.replica_pool import ReplicaPool
from router.worker_link import PendingCall, Traffic, WorkerLink

Answer = Callable[[expert_pb2.ComputeRequest], expert_pb2.ComputeResponse]


def scaled_rows(request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
    """The right answer: each expert's rows times slot + 1."""
    hidden = from_wire(request.hidden)
    parts = [hidden[list(expert.rows)] * (expert.slot + 1) for expert in request.experts]
    return expert_pb2.ComputeResponse(
        call_id=request.call_id,
        epoch=request.epoch,
        versions=[expert.version for expert in request.experts],
        output=to_wire(torch.cat(parts)),
    )


class FakeLink(WorkerLink):
    """Answers when it is asked to receive: with `answer`, or by raising what `answer` raises."""

    def __init__(self, replica: Replica, answer: Answer = scaled_rows) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self.answer = answer
        self.requests: list[expert_pb2.ComputeRequest] = []
        self.closed = False

    @property
    def connected(self) -> bool:
        return not self.closed

    @property
    def num_in_flight(self) -> int:
        return 0

    def send(self, request: expert_pb2.ComputeRequest) -> PendingCall:
        request.call_id = len(self.requests) + 1
        self.requests.append(request)
        return PendingCall(request.call_id, Future())

    def receive(self, call: PendingCall, timeout_s: float) -> expert_pb2.ComputeResponse:
        return self.answer(self.requests[call.call_id - 1])

    def close(self) -> None:
        self.closed = True


def failing(error: MoesaicError | TimeoutError) -> Answer:
    """A worker that never gives an answer."""

    def answer(_: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        raise error

    return answer


def spoiled(**changes: Any) -> Answer:
    """A worker whose answers have fields replaced."""

    def answer(request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        response = scaled_rows(request)
        response.MergeFrom(expert_pb2.ComputeResponse(epoch=changes.get("epoch", "")))
        if "versions" in changes:
            del response.versions[:]
            response.versions.extend(changes["versions"])
        if "output" in changes:
            response.output.CopyFrom(to_wire(changes["output"](from_wire(response.output))))
        return response

    return answer


def digest(layer: int, slot: int) -> bytes:
    return bytes([layer, slot]) * 16


def make_epoch(num_layers: int, num_slots: int) -> Epoch:
    return Epoch.of(
        "tiny",
        {
            ExpertAddress(layer, slot): digest(layer, slot)
            for layer in range(num_layers)
            for slot in range(num_slots)
        },
    )


def make_pool(
    epoch: Epoch, workers: Mapping[str, range], answers: Mapping[str, Answer] | None = None
) -> tuple[ReplicaPool, dict[str, FakeLink]]:
    """A pool over fake workers; `workers` says which slots (of every layer) each one holds."""
    links: dict[str, FakeLink] = {}

    def connect(replica: Replica) -> WorkerLink:
        links[replica.worker] = FakeLink(replica, (answers or {}).get(replica.worker, scaled_rows))
        return links[replica.worker]

    replicas = tuple(
        Replica(
            name,
            f"{name}:1",
            f"{name}-1",
            {address: version for address, version in epoch.versions.items() if address.slot in slots},
        )
        for name, slots in workers.items()
    )
    pool = ReplicaPool(connect=connect)
    pool.update(RoutingTable(1, replicas))
    return pool, links

"""Workers that live in the test: a link that computes at once, and can be told to misbehave.

Expert (layer, slot) multiplies a row by slot + 1, so that expected results are plain arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import MoesaicError
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import expert_pb2
from moesaic.wire.tensors import data_of, decode_rows, encode_rows
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import GRPC, WorkerAnswer
from router.workers.worker_link import PendingCall, Traffic, WorkerLink

Answerer = Callable[[expert_pb2.ComputeRequest, torch.Tensor], WorkerAnswer]


def scaled_rows(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
    """The right answer: each expert's rows times slot + 1, in the way that the request asks for."""
    rows = decode_rows(request.hidden, hidden)
    parts = [rows[list(expert.rows)] * (expert.slot + 1) for expert in request.experts]
    if request.combine == expert_pb2.COMBINE_SUM:
        output = torch.zeros_like(rows)
        for expert, part in zip(request.experts, parts, strict=True):
            output[list(expert.rows)] += part * torch.tensor(expert.weights)[:, None]
    else:
        output = torch.cat(parts)
    header, wire = encode_rows(output, request.hidden.dtype)
    response = expert_pb2.ComputeResponse(
        call_id=request.call_id,
        epoch=request.epoch,
        versions=[expert.version for expert in request.experts],
        output=header,
        timing=expert_pb2.ComputeTiming(decode_us=1, queue_us=2, compute_us=3, encode_us=4),
    )
    return WorkerAnswer(response, data_of(wire))


class FakeLink(WorkerLink):
    """Answers when it is asked to receive: with `answer`, or by raising what `answer` raises."""

    def __init__(self, replica: Replica, answer: Answerer = scaled_rows) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self.answer = answer
        self.requests: list[expert_pb2.ComputeRequest] = []
        self.received: list[int] = []
        self.abandoned: list[int] = []
        self.closed = self.is_lost = False
        self.in_flight = 0

    @property
    def lost(self) -> bool:
        return self.is_lost

    @property
    def connected(self) -> bool:
        return not self.closed

    @property
    def num_in_flight(self) -> int:
        return self.in_flight

    def send(self, request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> PendingCall:
        request.call_id = len(self.requests) + 1
        self.requests.append(request)
        return PendingCall(request, hidden, GRPC, None, time.perf_counter())

    def receive(self, call: PendingCall, timeout_s: float) -> WorkerAnswer:
        self.received.append(call.request.call_id)
        return self.answer(call.request, call.hidden)

    def wait(self, call: PendingCall, timeout_s: float) -> bool:
        return True

    def abandon(self, call: PendingCall) -> None:
        self.abandoned.append(call.request.call_id)

    def take(self, call: PendingCall) -> WorkerAnswer | None:
        try:
            return self.receive(call, 0.0)
        except (MoesaicError, TimeoutError):
            return None

    def close(self) -> None:
        self.closed = True


def failing(error: MoesaicError | TimeoutError) -> Answerer:
    """A worker that never gives an answer."""

    def answer(_request: expert_pb2.ComputeRequest, _hidden: torch.Tensor) -> WorkerAnswer:
        raise error

    return answer


def spoiled(**changes: Any) -> Answerer:
    """A worker whose answers have fields replaced; `output` is a function of the right rows."""

    def answer(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        right = scaled_rows(request, hidden)
        response, output = right.response, right.output
        response.MergeFrom(expert_pb2.ComputeResponse(epoch=changes.get("epoch", "")))
        if "versions" in changes:
            del response.versions[:]
            response.versions.extend(changes["versions"])
        if "output" in changes:
            rows = changes["output"](decode_rows(response.output, output))
            header, output = encode_rows(rows, changes.get("dtype", response.output.dtype))
            response.output.CopyFrom(header)
        return WorkerAnswer(response, data_of(output))

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
    epoch: Epoch,
    workers: Mapping[str, range],
    answers: Mapping[str, Answerer] | None = None,
    *,
    name: str | None = None,
) -> tuple[ReplicaPool, dict[str, FakeLink]]:
    """A pool over fake workers; `workers` says which slots (of every layer) each one holds. With `name` all of
    them have that name."""
    links: dict[str, FakeLink] = {}

    def connect(replica: Replica) -> WorkerLink:
        worker = replica.incarnation.removesuffix("-1")
        links[worker] = FakeLink(replica, (answers or {}).get(worker, scaled_rows))
        return links[worker]

    replicas = tuple(
        Replica(
            worker if name is None else name,
            f"{worker}:1",
            f"{worker}-1",
            frozenset(version for version in epoch.expert_versions if version.address.slot in slots),
        )
        for worker, slots in workers.items()
    )
    pool = ReplicaPool(connect=connect)
    pool.update(RoutingTable(1, replicas))
    return pool, links

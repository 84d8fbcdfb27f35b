"""A real engine in the test, over one worker of the test that holds any versions: each computed plainly, row by row, so
that the bits of a row never depend on the rows beside it."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.expert_calls import ReferenceExperts
from support.fake_links import FakeLink
from support.hand_made import HandMadeExpert
from support.local_router import router_config
from torch import Tensor

from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, ExpertVersion, GateRow
from moesaic.expert_policy import ExpertPolicy
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import expert_pb2
from moesaic.wire.tensors import data_of, decode_rows, encode_rows
from router.assembly import load_router
from router.engine.engine import Engine
from router.engine.request import (
    Failed,
    Finished,
    PromptScored,
    SequenceEvent,
    SequenceRequest,
    TokenGenerated,
)
from router.engine.sampling_params import SamplingParams
from router.gating.model_view import EpochViews, ModelView
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import WorkerAnswer

WAIT_S = 60.0
Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated tokens, and the log probabilities of all tokens after the first."""

    tokens: list[int]
    logprobs: list[float]


class ViewRig:
    """A router over a folder, and the epochs that are made of it."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        reference = ReferenceExperts(folder)
        self._experts: dict[ExpertVersion, Compute] = {}
        versions = {
            address: self._hold(address, self._plain(reference, address))
            for address in reference.model.addresses
        }
        self.base = Epoch.of(folder.name, versions)
        self._pool = ReplicaPool(connect=self._connect)
        self.links: list[FakeLink] = []
        self.loaded = load_router(router_config(folder, "auto", **engine), self._pool, PhaseClock())
        self._revision = 0
        self._lost: frozenset[ExpertAddress] = frozenset()
        self._publish()

    def add(
        self,
        experts: Mapping[ExpertAddress, HandMadeExpert],
        *,
        name: str = "new",
        tags: Sequence[str] = (),
        rows: bool = True,
        base: Epoch | None = None,
    ) -> Epoch:
        """The epoch in which a bundle has put experts into slots, which may be new ones; with `rows`, what scores them."""
        base = base or self.base
        versions = {address: self._hold(address, expert) for address, expert in experts.items()}
        self._publish()
        made = {address: GateRow(expert.row.numpy().tobytes()) for address, expert in experts.items()}
        bundle = EpochBundle(name, hashlib.sha256(name.encode()).digest(), tuple(tags), tuple(experts))
        return Epoch.of(
            base.model,
            {**base.versions, **versions},
            gate_rows={**base.gate_rows, **(made if rows else {})},
            bundles=(*base.bundles, bundle),
        )

    def view(self, epoch: Epoch, **policy: Any) -> ModelView:
        views = EpochViews(epoch, self.loaded.gates, self.loaded.shape.hidden_size)
        return views.of(ExpertPolicy(**policy))

    def engine(self) -> Engine:
        return self.loaded.engine()

    def run(
        self, requests: Sequence[tuple[Sequence[int], ModelView]], num_new: int = 12, *, scored: bool = True
    ) -> list[Answer]:
        """All requests at once, greedily. `scored`: whether the log probabilities of the prompt are wanted, too."""
        engine = self.engine()
        events = [
            submit(engine, str(index), *request, num_new, scored=scored)
            for index, request in enumerate(requests)
        ]
        engine.start()
        try:
            return [collect(one) for one in events]
        finally:
            engine.stop(WAIT_S)

    def requests(self) -> list[expert_pb2.ComputeRequest]:
        """All calls so far."""
        return [request for link in self.links for request in link.requests]

    def forget(self) -> None:
        """From now on the worker holds nothing."""
        self._experts.clear()
        self._publish()

    def lose(self, *addresses: ExpertAddress) -> None:
        """From now on no replica holds these experts. None: all do again."""
        self._lost = frozenset(addresses)
        self._publish()

    def close(self) -> None:
        self._pool.close()

    def _hold(self, address: ExpertAddress, compute: Compute) -> bytes:
        digest = hashlib.sha256(f"{address} {len(self._experts)}".encode()).digest()
        self._experts[ExpertVersion(address, digest)] = compute
        return digest

    def _plain(self, reference: ReferenceExperts, address: ExpertAddress) -> Compute:
        return lambda rows: reference.expert(address.layer, address.slot, rows)

    def _publish(self) -> None:
        self._revision += 1
        held = frozenset(version for version in self._experts if version.address not in self._lost)
        replica = Replica("worker-0", "worker-0:1", "worker-0-1", held)
        self._pool.update(RoutingTable(self._revision, (replica,)))

    def _connect(self, replica: Replica) -> FakeLink:
        link = FakeLink(replica, self._answer)
        self.links.append(link)
        return link

    @torch.inference_mode()
    def _answer(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> WorkerAnswer:
        rows = decode_rows(request.hidden, hidden)
        parts = []
        for group in request.experts:
            version = ExpertVersion(ExpertAddress(request.layer, group.slot), group.version)
            parts += [self._experts[version](rows[row][None]) for row in group.rows]
        header, wire = encode_rows(torch.cat(parts), request.hidden.dtype)
        response = expert_pb2.ComputeResponse(
            call_id=request.call_id,
            epoch=request.epoch,
            versions=[group.version for group in request.experts],
            output=header,
        )
        return WorkerAnswer(response, data_of(wire))


@contextmanager
def view_rig(folder: Path, **engine: Any) -> Iterator[ViewRig]:
    rig = ViewRig(folder, **engine)
    try:
        yield rig
    finally:
        rig.close()


def submit(
    engine: Engine, name: str, prompt: Sequence[int], view: ModelView, num_new: int, *, scored: bool = True
) -> queue.SimpleQueue[SequenceEvent]:
    events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
    params = SamplingParams(
        max_tokens=num_new, temperature=0.0, logprobs=0, prompt_logprobs=0 if scored else None
    )
    deadline_s = time.monotonic() + WAIT_S
    engine.submit(SequenceRequest(name, tuple(prompt), params, deadline_s, events.put, view))
    return events


def collect(events: queue.SimpleQueue[SequenceEvent]) -> Answer:
    """Waits for the end of a sequence."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        match events.get(timeout=WAIT_S):
            case PromptScored(scores):
                logprobs += [score.logprob for score in scores]
            case TokenGenerated(token, finished):
                tokens.append(token.token_id)
                assert token.logprobs is not None
                logprobs.append(token.logprobs.logprob)
                if finished is not None:
                    return Answer(tokens, logprobs)
            case Failed(error):
                raise error
            case Finished():
                return Answer(tokens, logprobs)
            case _:
                pass

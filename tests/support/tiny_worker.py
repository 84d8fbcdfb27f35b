"""A worker without threads: the experts of a tiny model, the handler of its calls, and a batcher that is played."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from support.checkpoints import write_mixtral

from expert_worker.compute.call_queue import Computed, Ticket
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import CallHandler
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.errors import MoesaicError
from moesaic.families import describe_model


@dataclass(frozen=True)
class TinyWorker:
    store: ExpertStore
    handler: CallHandler


@cache
def tiny_worker() -> TinyWorker:
    """It holds slots 0 to 2 of both layers, D 32, F 24."""
    store, handler = ExpertStore(), CallHandler(worker="w", max_call_rows=64)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_mixtral(Path(folder)))
        model = describe_model(checkpoint)
        addresses = [ExpertAddress(layer, slot) for layer in range(2) for slot in range(3)]
        form = ExpertForm(torch.device("cpu"), torch.float32)
        for address, held in load_experts(checkpoint, model, addresses, form):
            store.add(address, held)
    handler.open(model, store)
    return TinyWorker(store, handler)


class PlayedBatcher:
    """Takes every call, and computes them when it is told to."""

    listening_since_s = 0.0

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []

    def attach(self, source: object) -> None: ...

    def detach(self, source: object) -> None: ...

    def await_room(self, source: object, awaited: bool) -> None: ...

    def offer(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def compute(self) -> None:
        while self._waiting:
            ticket = self._waiting.pop(0)
            (result,) = compute_calls([ticket.call])
            if not isinstance(result, MoesaicError):
                result = Computed(result, 0.0, 0.0, time.monotonic())
            ticket.answer(result)

"""Shadowing: rows whose answers another epoch's experts give as well, compared with those in use and then thrown away.

A shadow never delays or endangers a step: few calls are in flight at a time, they hold few rows, nobody waits for their
answers, and a worker that has much to do gets none.

Shapes: T tokens, K experts per token, n rows, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.epoch import ExpertAddress
from moesaic.errors import DataLoss
from moesaic.wire.tensors import decode_rows
from router.dispatch.layer_call import LayerCall
from router.dispatch.layer_request import LayerRequest
from router.dispatch.row_grouping import RowsBySlot, WorkerRows
from router.gating.gate import NO_SLOT
from router.gating.model_view import ModelView
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import WorkerAnswer
from router.workers.worker_link import PendingCall, WorkerLink

log = logging.getLogger(__name__)

# Tokens of a layer that are shadowed at most, and calls that are in flight at a time.
MAX_TOKENS = 64
MAX_CALLS = 2
# A worker that has so many calls gets no shadow.
BUSY_CALLS = 4
# For so many steps nothing is shadowed after a worker was too slow.
RESTING_STEPS = 8


@dataclass(frozen=True, slots=True)
class Shadow:
    """A share of the sequences of an epoch, by a hash of their ids, is also computed in another one, for comparison."""

    epoch: str
    view: ModelView
    share: float


@dataclass(slots=True, eq=False)
class ShadowTally:
    """How the answers of shadowed experts compare. Only the engine's thread writes it; any thread may read it."""

    rows: int = 0
    min_cosine: float = 1.0
    sum_cosine: float = 0.0
    max_difference: float = 0.0

    @property
    def mean_cosine(self) -> float:
        return self.sum_cosine / self.rows if self.rows else 0.0

    def compare(self, used: Tensor, shadow: Tensor) -> None:
        """Counts rows [n, D] in use and the shadow's answers for the same rows. A row that is not finite counts as opposite,
        and as infinitely far."""
        used, shadow = used.float(), shadow.float()
        cosines = torch.nn.functional.cosine_similarity(used, shadow).nan_to_num(-1.0)
        differences = (used - shadow).abs().nan_to_num(math.inf)
        self.rows += len(used)
        self.min_cosine = min(self.min_cosine, float(cosines.min()))
        self.sum_cosine += float(cosines.sum())
        self.max_difference = max(self.max_difference, float(differences.max()))


@dataclass(frozen=True, slots=True)
class ShadowedRows:
    """The tokens of a micro-batch that are shadowed, by what, and where the comparison is counted."""

    view: ModelView
    tokens: frozenset[int]
    tally: ShadowTally


@dataclass(slots=True, eq=False)
class _ShadowCall:
    shadowed: ShadowedRows
    layer_call: LayerCall
    request: LayerRequest
    link: WorkerLink
    rows: WorkerRows
    versions: list[bytes]
    pending: PendingCall
    # The number of the step that sent it.
    step: int
    # The answers in use; None until the layer has them.
    used: Tensor | None = None


class ShadowCalls:
    """The shadows in flight. They outlive the step that sent them, and end with the next one. Used by the engine's thread
    alone."""

    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool
        self._calls: deque[_ShadowCall] = deque()
        self._step = 0
        # No shadow is sent before this step: a worker was too slow for the last one.
        self._resting_until = 0

    def send(self, shadowed: ShadowedRows, layer_call: LayerCall, timeout_ms: int) -> None:
        """Sends the shadowed rows of a layer that was just sent itself."""
        versions = shadowed.view.versions.get(layer_call.request.layer, {})
        slots = None if self._step < self._resting_until else _mask(shadowed, layer_call, versions)
        if slots is None:
            return
        groups = RowsBySlot.of(slots)
        request = layer_call.request.in_epoch(shadowed.view.epoch.id)
        for link, chosen in self._choose(request.layer, groups, versions).items():
            if not self._make_room():
                return
            rows = groups.worker_rows(chosen)
            digests = [versions[slot] for slot in rows.slots]
            pending = link.send(*request.to_worker(rows, digests, timeout_ms))
            self._calls.append(
                _ShadowCall(shadowed, layer_call, request, link, rows, digests, pending, self._step)
            )

    def note_used(self, layer_call: LayerCall) -> None:
        """Keeps the answers of a layer that has been received, if all are there."""
        for call in self._calls:
            if call.layer_call is layer_call and not layer_call.errors:
                call.used = layer_call.combiner.outputs_of(call.rows)

    def end_step(self) -> None:
        """Compares what has arrived for the step before, and drops the rest of it."""
        while self._calls and self._calls[0].step < self._step:
            self._take(self._calls.popleft())
        self._step += 1

    def _choose(
        self, layer: int, groups: RowsBySlot, versions: Mapping[int, bytes]
    ) -> dict[WorkerLink, list[int]]:
        chosen: dict[WorkerLink, list[int]] = {}
        for group, slot in enumerate(groups.slots):
            link = self._pool.pick(ExpertAddress(layer, slot), versions[slot])
            if link is not None and link.num_in_flight < BUSY_CALLS:
                chosen.setdefault(link, []).append(group)
        return chosen

    def _make_room(self) -> bool:
        """Ends the oldest call if there are too many; False if its layer is still waited for, or it was not answered."""
        if len(self._calls) < MAX_CALLS:
            return True
        return self._calls[0].used is not None and self._take(self._calls.popleft())

    def _take(self, call: _ShadowCall) -> bool:
        """Whether the worker has answered."""
        answer = call.link.take(call.pending)
        if answer is None:
            self._resting_until = self._step + RESTING_STEPS
            return False
        if call.used is not None:
            self._compare(call, call.used, answer)
        return True

    def _compare(self, call: _ShadowCall, used: Tensor, answer: WorkerAnswer) -> None:
        try:
            call.request.check(answer, call.rows, call.versions)
        except DataLoss as error:
            log.warning("a shadow's answer is malformed", extra={"fields": {"why": error.message}})
        else:
            call.shadowed.tally.compare(used, decode_rows(answer.response.output, answer.output))


def _mask(shadowed: ShadowedRows, layer_call: LayerCall, versions: Mapping[int, bytes]) -> Tensor | None:
    """The slots [T, K] of those assignments that are shadowed, else NO_SLOT; None if there are none."""
    in_use = zip(layer_call.groups.slots, layer_call.versions, strict=True)
    differing = {slot for slot, version in in_use if versions.get(slot, version) != version}
    if not differing:
        return None
    slots = layer_call.slots
    tokens: Sequence[int] = range(len(slots)) if layer_call.tokens is None else layer_call.tokens
    rows = [row for row, token in enumerate(tokens) if token in shadowed.tokens][:MAX_TOKENS]
    masked = torch.full_like(slots, NO_SLOT)
    masked[rows] = slots[rows]
    masked[~torch.isin(masked, torch.tensor(sorted(differing)))] = NO_SLOT
    return masked if (masked != NO_SLOT).any() else None

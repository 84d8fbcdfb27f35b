"""One layer of a micro-batch in flight: what was asked, who was asked for it, and what came back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from opentelemetry import trace

from moesaic.errors import MoesaicError
from router.dispatch.combine import Landing
from router.dispatch.layer_request import LayerMessage
from router.dispatch.row_grouping import Part, SlotOrder
from router.workers.worker_link import PendingCall, WorkerLink


@dataclass(slots=True, eq=False)
class WorkerCall:
    """One message to one worker."""

    link: WorkerLink
    part: Part
    versions: list[bytes]
    pending: PendingCall
    span: trace.Span
    # Whether it was waited for.
    landed: bool = False


@dataclass(slots=True, eq=False)
class LayerCall:
    """Belongs to the step that sent it."""

    layer: int
    # That the model computes in.
    dtype: torch.dtype
    order: SlotOrder
    message: LayerMessage
    landing: Landing
    # Of the micro-batch, those that are asked for; None: all.
    tokens: Sequence[int] | None
    # The calls of the newest wave, and all that were answered well.
    wave: list[WorkerCall] = field(default_factory=list)
    answered: list[WorkerCall] = field(default_factory=list)
    wave_ends_s: float = 0.0
    # By place in `order`: why nothing landed for it, and the workers that failed to send it.
    errors: dict[int, MoesaicError] = field(default_factory=dict)
    tried: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    def fail(self, part: Part, error: MoesaicError) -> None:
        """Nothing lands for these places, unless another replica is asked."""
        self.errors.update(dict.fromkeys(part.places, error))
        self.landing.clear(part)

    def failed_tokens(self) -> dict[int, MoesaicError]:
        """By token of the micro-batch: why one of its experts is missing."""
        failed = {row: error for place, error in self.errors.items() for row in self.order.tokens_of(place)}
        return failed if self.tokens is None else {self.tokens[row]: error for row, error in failed.items()}

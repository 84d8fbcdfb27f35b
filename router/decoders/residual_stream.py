"""A micro-batch between two layers: its rows, and what it waits for.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.decoders.decoder import MicroBatch
from router.dispatch.layer_call import LayerCall


@dataclass(slots=True)
class Flight:
    """A micro-batch on its way through the layers."""

    part: MicroBatch
    hidden: torch.Tensor  # [T, D]
    # Of the tokens, those that `hidden` still has; None: all.
    tokens: list[int] | None = None
    # What the layer that it is in adds: what experts were asked for, and what was computed here meanwhile.
    call: LayerCall | None = None
    beside: torch.Tensor | None = None  # [T, D]

    def land(self) -> None:
        """Adds what the last layer makes of it."""
        if self.call is not None:
            self.hidden += self.part.experts.receive(self.call)
            self.call = None
        if self.beside is not None:
            self.hidden += self.beside
            self.beside = None

    def keep_wanted(self, mixed: torch.Tensor) -> torch.Tensor:
        """In the last layer the caches are written, and nothing looks any more at tokens without wanted logits.
        Drops those, also of `mixed`."""
        rows = self.part.rows.tolist()
        if rows != list(range(len(mixed))):
            self.tokens = rows
            index = self.part.rows.to(mixed.device)
            self.hidden, mixed = self.hidden[index], mixed[index]
        return mixed


def landed(flights: Sequence[Flight]) -> torch.Tensor:
    """What all of them come to behind the last layer, one after the other."""
    for flight in flights:
        flight.land()
    return flights[0].hidden if len(flights) == 1 else torch.cat([flight.hidden for flight in flights])

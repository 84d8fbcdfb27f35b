"""The residual stream of a micro-batch: its hidden states between two layers, and the outputs that are still to be added.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.decoders.capture import CapturedRows, captured_among
from router.decoders.decoder import MicroBatch
from router.dispatch.layer_call import LayerCall
from router.gating.model_view import ViewRows, rows_among


@dataclass(slots=True)
class ResidualStream:
    """The hidden states of one micro-batch as they pass the layers."""

    micro_batch: MicroBatch
    hidden: torch.Tensor  # [T, D]
    # The tokens of the micro-batch that `hidden` still has; None: all of them.
    tokens: list[int] | None = None
    # What the current layer adds: the answer to this call of its experts, and what was computed here in the meantime.
    call: LayerCall | None = None
    local_output: torch.Tensor | None = None  # [T, D]

    @property
    def views(self) -> Sequence[ViewRows]:
        """How the rows of `hidden` see the gates."""
        views = self.micro_batch.views
        return views if self.tokens is None or len(views) < 2 else rows_among(views, self.tokens)

    @property
    def captures(self) -> Sequence[CapturedRows]:
        """The rows of `hidden` that are read out."""
        captures = self.micro_batch.captures
        return captured_among(captures, self.tokens) if captures and self.tokens is not None else captures

    def add_layer_output(self) -> None:
        """Waits for the experts of the current layer and adds all outputs of the layer."""
        if self.call is not None:
            self.hidden += self.micro_batch.experts.receive(self.call)
            self.call = None
        if self.local_output is not None:
            self.hidden += self.local_output
            self.local_output = None

    def keep_wanted(self, mixed: torch.Tensor) -> torch.Tensor:
        """Drops the tokens without wanted logits, from `mixed` too. Possible in the last layer once its mixer has
        written the caches: nothing reads those tokens any more."""
        rows = self.micro_batch.rows.tolist()
        if rows != list(range(len(mixed))):
            self.tokens = rows
            index = self.micro_batch.rows.to(mixed.device)
            self.hidden, mixed = self.hidden[index], mixed[index]
        return mixed


def final_hidden(streams: Sequence[ResidualStream]) -> torch.Tensor:
    """The hidden states after the last layer, one stream after the other."""
    for stream in streams:
        stream.add_layer_output()
    return streams[0].hidden if len(streams) == 1 else torch.cat([stream.hidden for stream in streams])

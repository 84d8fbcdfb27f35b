"""Expert calls as a router makes them, and the plain per-expert computation that the answers must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from support.wire_tensors import to_wire
from torch import Tensor

from moesaic.checkpoint import open_checkpoint
from moesaic.families import describe_model
from moesaic.manifest import ExpertAddress
from moesaic.v1 import expert_pb2


def compute_request(
    hidden: Tensor,
    rows: Mapping[int, Sequence[int]],
    versions: Mapping[ExpertAddress, bytes],
    *,
    layer: int = 0,
    call_id: int = 1,
    weights: Mapping[int, Sequence[float]] | None = None,
    timeout_ms: int = 10_000,
    traceparent: str = "",
) -> expert_pb2.ComputeRequest:
    """A call of one layer: `rows` by slot; with `weights` by slot it asks for sums."""
    return expert_pb2.ComputeRequest(
        call_id=call_id,
        epoch="epoch-1",
        layer=layer,
        hidden=to_wire(hidden),
        experts=[
            expert_pb2.ExpertRows(
                slot=slot,
                version=versions.get(ExpertAddress(layer, slot), bytes(32)),
                rows=indices,
                weights=() if weights is None else weights[slot],
            )
            for slot, indices in rows.items()
        ],
        combine=expert_pb2.COMBINE_ROWS if weights is None else expert_pb2.COMBINE_SUM,
        timeout_ms=timeout_ms,
        traceparent=traceparent,
    )


class ReferenceExperts:
    """All experts of a checkpoint, computed one by one in float32."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = open_checkpoint(folder)
        self._model = describe_model(self._checkpoint)

    def weight(self, layer: int, slot: int, name: str) -> Tensor:
        """One weight, in float32."""
        where = self._model.expert_weights(layer, slot)[name]
        with safe_open(self._checkpoint.tensors[where.tensor].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(where.tensor)
        if where.index is not None:
            tensor = tensor[where.index]
        if where.rows is not None:
            tensor = tensor[slice(*where.rows)]
        return tensor.float().clone()

    def expert(self, layer: int, slot: int, x: Tensor) -> Tensor:
        gate, up, down = (self.weight(layer, slot, name) for name in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x.float(), gate)) * F.linear(x.float(), up), down)

    def rows(self, layer: int, hidden: Tensor, rows: Mapping[int, Sequence[int]]) -> Tensor:
        """What COMBINE_ROWS must give."""
        return torch.cat([self.expert(layer, slot, hidden[list(indices)]) for slot, indices in rows.items()])

"""Expert calls as a router makes them, and the plain per-expert computation that the answers must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from support.wire_tensors import to_wire
from torch import Tensor
from transformers.activations import ACT2FN

from expert_worker.experts.expert import Expert
from expert_worker.experts.store import ExpertStore
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import DenseLayers, describe_model
from moesaic.families.model import WeightPattern
from moesaic.v1 import expert_pb2


def versions_of(store: ExpertStore) -> dict[ExpertAddress, bytes]:
    """The version in each slot, of a store that holds one of each."""
    return dict(store.experts().keys())


def experts_of(store: ExpertStore) -> dict[ExpertAddress, Expert]:
    """The expert in each slot, of a store that holds one version of each."""
    return {version.address: expert for version, expert in store.experts().items()}


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

    def __init__(self, folder: Path, dense_layers: DenseLayers = "auto") -> None:
        self._checkpoint = open_checkpoint(folder)
        self.model = describe_model(self._checkpoint, dense_layers)

    @cache  # noqa: B019 (an instance lives as long as its test)
    def weight(self, layer: int, slot: int, name: str) -> Tensor:
        """One weight, in float32."""
        experts = self.model.experts[layer]
        pattern = experts.layout[name]
        tensor = self._read(pattern.name(layer, slot), (experts.num_slots, pattern, slot))
        scales_name = pattern.scales_name(layer, slot)
        if scales_name is not None:
            scales = self._read(scales_name, (experts.num_slots, pattern, slot))
            tensor = {"fp8_block": decode_fp8, "mxfp4": decode_mxfp4}[pattern.encoding](tensor, scales)
        if pattern.transposed:
            tensor = tensor.T
        part, num_parts = pattern.part
        rows = tensor[part::num_parts] if pattern.interleaved else tensor.chunk(num_parts)[part]
        assert rows.shape == experts.module.shape(name)
        return rows.float().clone()

    def expert(self, layer: int, slot: int, x: Tensor) -> Tensor:
        module = self.model.experts[layer].module

        def project(name: str, rows: Tensor) -> Tensor:
            bias = self.weight(layer, slot, f"{name}_bias") if module.biased else None
            return F.linear(rows, self.weight(layer, slot, name), bias)

        up = project("up", x.float())
        if module.activation == "clamped_swiglu":
            gate = project("gate", x.float()).clamp(max=module.limit)
            inner = (up.clamp(-module.limit, module.limit) + 1) * gate * torch.sigmoid(1.702 * gate)
        elif module.gated:
            inner = ACT2FN[module.activation](project("gate", x.float())) * up
        else:
            inner = ACT2FN[module.activation](up)
        return project("down", inner)

    def rows(self, layer: int, hidden: Tensor, rows: Mapping[int, Sequence[int]]) -> Tensor:
        """What COMBINE_ROWS must give."""
        return torch.cat([self.expert(layer, slot, hidden[list(indices)]) for slot, indices in rows.items()])

    def _read(self, name: str, where: tuple[int, WeightPattern, int]) -> Tensor:
        """The slot's own part of a tensor."""
        num_slots, pattern, slot = where
        with safe_open(self._checkpoint.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        # All slots of a layer may lie behind one another, [E * F, D].
        return tensor.unflatten(0, (num_slots, -1))[slot].squeeze(0) if pattern.stacked else tensor


def decode_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """float8 [O, I] and the factor of each block of 128 x 128."""
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * wide[: values.shape[0], : values.shape[1]]


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Two 4-bit floats a byte [O, I / 32, 16], the low one first, and exponents [O, I / 32]."""
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat((positive, -positive))
    values = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1)
    return (values.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)

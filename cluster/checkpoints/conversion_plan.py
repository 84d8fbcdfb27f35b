"""The plan of a conversion: every tensor of the new folder, its source, and its shard. Pure.

The new folder has Hugging Face's form, with the tensor names under which the family is published.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moesaic.checkpoints.checkpoint import SINGLE_FILE, Checkpoint
from moesaic.checkpoints.safetensors_file import DTYPE_BYTES
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel, mixtral

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write, made from the tensor `source`.

    `slot`: only this slot of a stacked source. `transposed`: the source is stored transposed. `rotary_heads`:
    the source has interleaved rotary rows for this many heads, which are reordered into halves.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    slot: int | None = None
    transposed: bool = False
    rotary_heads: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, with its tensors in their order in the file."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors, without the header."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def head(self) -> bytes:
        """The beginning of the file: the length of the header, and the header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.num_bytes
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def plan_tensors(checkpoint: Checkpoint, model: MoeModel) -> tuple[PlannedTensor, ...]:
    """The tensors, layer by layer. `model` describes `checkpoint` with its dense layers as experts."""
    planned = _from_mistral(checkpoint, model) if checkpoint.in_mistral_format else _unchanged(checkpoint)
    return tuple(sorted(planned, key=lambda tensor: _natural(tensor.name)))


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `max_bytes`, or of one larger tensor."""
    groups: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.num_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= tensor.num_bytes
    return tuple(
        Shard(_shard_name(index, len(groups)), tuple(sorted(group, key=_by_alignment)))
        for index, group in enumerate(groups, start=1)
    )


def index_of(shards: Iterable[Shard]) -> dict[str, object]:
    """The content of the shard index."""
    shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: shard_of[name].file for name in sorted(shard_of, key=_natural)},
    }


def _unchanged(checkpoint: Checkpoint) -> Iterator[PlannedTensor]:
    for name, entry in checkpoint.tensors.items():
        yield PlannedTensor(name, name, entry.dtype, entry.shape)


def _from_mistral(checkpoint: Checkpoint, model: MoeModel) -> Iterator[PlannedTensor]:
    for parameter, tensor in model.dense.items():
        dtype = checkpoint.tensors[tensor.source].dtype
        yield PlannedTensor(
            mixtral.published_name(parameter),
            tensor.source,
            dtype,
            tensor.shape,
            rotary_heads=tensor.rotary_heads,
        )
    for address in model.addresses:
        yield from _expert(checkpoint, model, address)


def _expert(checkpoint: Checkpoint, model: MoeModel, address: ExpertAddress) -> Iterator[PlannedTensor]:
    """The weights of one expert, or the MLP of a dense layer."""
    layer, slot = address.layer, address.slot
    experts = model.experts[layer]
    for weight, pattern in experts.layout.items():
        source = pattern.name(layer, slot)
        if experts.gate is None:
            name = experts.parameters[weight].format(layer=layer)
        else:
            name = mixtral.CLASSIC[weight].name(layer, slot)
        yield PlannedTensor(
            name,
            source,
            checkpoint.tensors[source].dtype,
            experts.module.shape(weight),
            slot=slot if pattern.stacked else None,
            transposed=pattern.transposed,
        )


def _shard_name(index: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{index:05}-of-{count:05}.safetensors"


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers in a name by value: layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _by_alignment(tensor: PlannedTensor) -> int:
    """A sort key that puts wide types first, so that every tensor starts at a multiple of its item size."""
    return -DTYPE_BYTES[tensor.dtype]

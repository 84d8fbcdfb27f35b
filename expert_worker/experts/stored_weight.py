"""Where the bytes of an expert lie in the checkpoint, and how they are read: no others are.

Files are read, not mapped: a file that shrinks while it is read is an error that names the file, where a
mapping would end the process, and exactly the bytes that are asked for are read.

Shapes: O outputs, I inputs of a weight.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.safetensors_file import TensorEntry
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError
from moesaic.families.model import Encoding, ExpertLayer, WeightPattern
from moesaic.families.tensor_check import FP8_BLOCK

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class Region:
    """A run of rows of a tensor, which is a run of bytes of a file."""

    tensor: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int

    def part(self, first: int, end: int) -> Region:
        """Rows [first, end) of the region."""
        row_bytes = self.num_bytes // self.shape[0]
        return replace(
            self,
            shape=(end - first, *self.shape[1:]),
            first_byte=self.first_byte + first * row_bytes,
            num_bytes=(end - first) * row_bytes,
        )

    def announce(self) -> None:
        """Lets the system begin to fetch the region. Errors of the file are raised when it is read."""
        with suppress(OSError), self.file.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.first_byte, self.num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, memory: Tensor | None = None) -> Tensor:
        """Reads the region, into the beginning of `memory` if given. Raises CheckpointError with the file."""
        if memory is None:
            memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        memory = memory[: self.num_bytes]
        rest = memory.numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.first_byte)
                # A call reads at most 2 GiB.
                while rest and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{self.file.name}: cannot be read", field=self.file.name) from error
        if rest:
            raise CheckpointError(f"{self.file.name}: truncated since it was opened", field=self.file.name)
        return memory.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of one expert: `rows` and `columns` of `data`, [O, I], or [I, O] where `transposed`.

    `scales` of fp8_block has the scales of the blocks of `data`, whose first row is row `scale_row` of a
    block; of mxfp4 it has those of every row.
    """

    data: Region
    rows: slice
    columns: slice
    transposed: bool
    encoding: Encoding
    scales: Region | None = None
    scale_row: int = 0

    @property
    def is_run(self) -> bool:
        """Whether `data` is just the weight, row by row."""
        return self.rows == self.columns == slice(None) and not self.transposed and self.scales is None

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.data,) if self.scales is None else (self.data, self.scales)


def locate(checkpoint: Checkpoint, experts: ExpertLayer, address: ExpertAddress) -> dict[str, StoredWeight]:
    """Where each weight of an expert lies, by its name in the module."""
    return {weight: _locate(checkpoint, experts.layout[weight], address) for weight in experts.module.weights}


def stored_bytes(checkpoint: Checkpoint, experts: ExpertLayer, address: ExpertAddress) -> int:
    """The number of bytes that are read for an expert."""
    weights = locate(checkpoint, experts, address).values()
    return sum(region.num_bytes for region in {region for weight in weights for region in weight.regions})


def _locate(checkpoint: Checkpoint, pattern: WeightPattern, address: ExpertAddress) -> StoredWeight:
    index = address.slot if pattern.stacked else None
    name = pattern.name(*address)
    shape = checkpoint.tensors[name].shape[1 if pattern.stacked else 0 :]
    # A bias has one dimension and cannot be transposed.
    transposed = pattern.transposed and len(shape) > 1
    own = _part(pattern, shape[1] if transposed else shape[0])
    everything = slice(None)
    # Adjoining rows are read alone. Where the weight is some columns, or every n-th row, the others are read
    # with it.
    first, end = (0, shape[0]) if transposed or pattern.interleaved else (own.start, own.stop)
    own_rows = own if pattern.interleaved and not transposed else everything
    scales, scale_row = None, 0
    if (scales_name := pattern.scales_name(*address)) is not None:
        block = FP8_BLOCK if pattern.encoding == "fp8_block" else 1
        scales = _region(checkpoint, scales_name, index, first // block, -(-end // block))
        scale_row = first % block
    return StoredWeight(
        _region(checkpoint, name, index, first, end),
        own_rows,
        own if transposed else everything,
        transposed,
        pattern.encoding,
        scales,
        scale_row,
    )


def _part(pattern: WeightPattern, size: int) -> slice:
    part, num_parts = pattern.part
    if pattern.interleaved:
        return slice(part, size, num_parts)
    return slice(part * size // num_parts, (part + 1) * size // num_parts)


def _region(checkpoint: Checkpoint, name: str, index: int | None, first: int, end: int) -> Region:
    """Rows [first, end) of a tensor, or of entry `index` of one that stacks slots."""
    entry = checkpoint.tensors[name]
    shape = entry.shape if index is None else entry.shape[1:]
    entry_bytes = entry.num_bytes if index is None else entry.num_bytes // entry.shape[0]
    first_byte = entry.first_byte + (index or 0) * entry_bytes
    whole = Region(name, entry.file, _DTYPES[entry.dtype], shape, first_byte, entry_bytes)
    return whole.part(first, end)


def whole_weight(entry: TensorEntry) -> StoredWeight:
    """A weight that is all of a tensor, as in bundles."""
    region = Region(
        entry.name, entry.file, _DTYPES[entry.dtype], entry.shape, entry.first_byte, entry.num_bytes
    )
    return StoredWeight(region, slice(None), slice(None), transposed=False, encoding="plain")

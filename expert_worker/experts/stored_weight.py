"""Where the bytes of an expert lie, and reading them: no more than this expert's own.

Files are read, not mapped: a file that shrinks under a reader is an error with a name, not the end of the process, and
what was read is what was asked for, to the byte.
"""

# Shapes: O outputs, I inputs of a weight; R rows, C columns of it as it is stored.

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints.checkpoint import Checkpoint
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
        """Rows [first, end) of it."""
        row_bytes = self.num_bytes // self.shape[0]
        return replace(
            self,
            shape=(end - first, *self.shape[1:]),
            first_byte=self.first_byte + first * row_bytes,
            num_bytes=(end - first) * row_bytes,
        )

    def announce(self) -> None:
        """Lets the system begin to fetch it; what is wrong with the file is found when it is read."""
        with suppress(OSError), self.file.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.first_byte, self.num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, memory: Tensor | None = None) -> Tensor:
        """Into the beginning of uint8 memory, if there is some. Raises CheckpointError with the file's name."""
        if memory is None:
            memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        memory = memory[: self.num_bytes]
        rest = memory.numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.first_byte)
                # One call reads at most 2 GiB.
                while rest and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{self.file.name}: cannot be read", field=self.file.name) from error
        if rest:
            raise CheckpointError(f"{self.file.name}: truncated since it was opened", field=self.file.name)
        return memory.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of one expert: those `rows` and `columns` of `data` that are its own, [O, I] or where `transposed`
    [I, O]; a bias is one column.

    `scales` of fp8_block has the factors of `data`, whose first row is row `scale_row` of a block; of mxfp4 those of
    every row.
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
        """Whether `data` is the weight, row by row."""
        return self.rows == self.columns == slice(None) and not self.transposed and self.scales is None

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.data,) if self.scales is None else (self.data, self.scales)


def locate(checkpoint: Checkpoint, experts: ExpertLayer, address: ExpertAddress) -> dict[str, StoredWeight]:
    """Where every weight of an expert lies, by its name in the module."""
    return {weight: _locate(checkpoint, experts.layout[weight], address) for weight in experts.module.weights}


def stored_bytes(checkpoint: Checkpoint, experts: ExpertLayer, address: ExpertAddress) -> int:
    """Bytes that are read for an expert."""
    weights = locate(checkpoint, experts, address).values()
    return sum(region.num_bytes for region in {region for weight in weights for region in weight.regions})


def _locate(checkpoint: Checkpoint, pattern: WeightPattern, address: ExpertAddress) -> StoredWeight:
    index = address.slot if pattern.stacked else None
    name = pattern.name(*address)
    shape = checkpoint.tensors[name].shape[1 if pattern.stacked else 0 :]
    # A bias has but one direction to lie in.
    transposed = pattern.transposed and len(shape) > 1
    own = _part(pattern, shape[1] if transposed else shape[0])
    everything = slice(None)
    # Rows that lie together are read alone; of columns, and of every n-th row, the others are read, too.
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

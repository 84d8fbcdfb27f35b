"""Reads the weights of one expert: hashes, decodes, checks and lays them out."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from expert_worker.experts.stored_weight import Region, StoredWeight
from moesaic.compute.dequantise import dequantise_fp8_block, dequantise_mxfp4, fp8_row_scales
from moesaic.epoch import VersionHasher
from moesaic.errors import CheckpointError, Unavailable
from moesaic.families.model import Encoding, ExpertModule

# How many bytes are read, hashed and copied at a time, so that they stay in the CPU's cache.
_BYTES_AT_ONCE = 1 << 20
# How many numbers of an encoded weight are decoded at a time.
_NUMBERS_AT_ONCE = 1 << 17


class Scratch(threading.local):
    """Memory of a thread that is used again and again, because new pages cost more than filling them."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, use: str, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, valid until the next call for the same use."""
        memory = self._memory.get(use)
        if memory is None or len(memory) < num_bytes:
            self._memory[use] = memory = torch.empty(num_bytes, dtype=torch.uint8)
        return memory[:num_bytes]


class ExpertReader:
    """Reads the weights of one expert and computes its version from them."""

    def __init__(
        self, weights: Mapping[str, StoredWeight], stopping: threading.Event, scratch: Scratch
    ) -> None:
        self._weights = weights
        self._stopping = stopping
        self._scratch = scratch
        self._digests: dict[str, tuple[tuple[int, ...], bytes]] = {}
        # Gate and up may lie in the same region, which is read once.
        self._uses = Counter(region for weight in weights.values() for region in weight.regions)
        self._shared: dict[Region, Tensor] = {}
        for region in self._uses:
            region.announce()

    def read(self, names: Sequence[str], weights: Tensor, biases: Tensor | None) -> None:
        """Fills equal runs of rows of `weights`, and of `biases`, with the weights of these names."""
        for name, target in zip(names, weights.chunk(len(names)), strict=True):
            self._read(name, target)
        if biases is not None:
            for name, target in zip(names, biases.chunk(len(names)), strict=True):
                self._read(f"{name}_bias", target)

    def digest(self, name: str) -> bytes:
        """The sha256 of a weight that was read, as it is stored: of its numbers, row by row, or of its codes."""
        return self._digests[name][1]

    def version(self, module: ExpertModule, dtype: str) -> bytes:
        """The digest of the expert. All its weights must have been read."""
        hasher = VersionHasher(module.kind, dtype)
        for name in module.weights:
            hasher.update(name, *self._digests[name])
        return hasher.digest()

    def _read(self, name: str, target: Tensor) -> None:
        weight = self._weights[name]
        if weight.is_run:
            digest = self._copy_run(weight, target)
        elif weight.scales is None:
            digest = _copy(weight, self._fetch(weight.data), target)
        else:
            digest = _decode(weight, self._fetch(weight.data), self._fetch(weight.scales), target)
        self._digests[name] = tuple(target.shape), digest

    def _copy_run(self, weight: StoredWeight, target: Tensor) -> bytes:
        """Does the same as `_copy`, in pieces."""
        data, digest = weight.data, hashlib.sha256()
        row_bytes = data.num_bytes // data.shape[0]
        count = max(1, _BYTES_AT_ONCE // row_bytes)
        memory = self._scratch.take("piece", count * row_bytes)
        for number, part in enumerate(target.split(count)):
            self._check_stopping()
            first = number * count
            piece = data.part(first, first + len(part)).read(memory)
            digest.update(raw_bytes(piece))
            check_finite(piece, weight.data.tensor)
            part.copy_(piece)
        return digest.digest()

    def _fetch(self, region: Region) -> Tensor:
        self._check_stopping()
        read = self._shared.pop(region, None)
        if read is None:
            read = region.read()
        self._uses[region] -= 1
        if self._uses[region]:
            self._shared[region] = read
        return read

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise Unavailable("stopped while loading")


def _copy(weight: StoredWeight, data: Tensor, target: Tensor) -> bytes:
    """Fills the target with a weight that is stored as plain numbers; returns the digest of these numbers."""
    own = data.view(len(data), -1)[weight.rows, weight.columns]
    own = (own.T if weight.transposed else own).contiguous()
    check_finite(own, weight.data.tensor)
    target.copy_(own.view(target.shape))
    return hashlib.sha256(raw_bytes(own)).digest()


def _decode(weight: StoredWeight, data: Tensor, scales: Tensor, target: Tensor) -> bytes:
    """Fills the target with the numbers of an encoded weight; returns the digest of its codes and scales."""
    own, own_scales = data[weight.rows], _scales_of_rows(weight, len(data), scales)
    filled = target.T if weight.transposed else target
    count = max(1, _NUMBERS_AT_ONCE // (target.numel() // len(filled)))
    parts = (tensor.split(count) for tensor in (own, own_scales, filled))
    for codes, factors, part in zip(*parts, strict=True):
        decoded = _DEQUANTISE[weight.encoding](codes, factors)[:, weight.columns]
        check_finite(decoded, weight.data.tensor)
        part.copy_(decoded.to(part.dtype))
    where = f"{weight.encoding} {weight.columns} {weight.transposed} {weight.scale_row}\0"
    digest = hashlib.sha256(where.encode())
    digest.update(raw_bytes(own))
    digest.update(raw_bytes(own_scales if weight.encoding == "mxfp4" else scales))
    return digest.digest()


_DEQUANTISE: dict[Encoding, Callable[[Tensor, Tensor], Tensor]] = {
    "fp8_block": dequantise_fp8_block,
    "mxfp4": dequantise_mxfp4,
}


def _scales_of_rows(weight: StoredWeight, num_rows: int, scales: Tensor) -> Tensor:
    """The scales of each row: mxfp4 stores them so, fp8_block stores one row of them per block of rows."""
    if weight.encoding == "mxfp4":
        return scales[weight.rows]
    return fp8_row_scales(scales, weight.scale_row, num_rows)[weight.rows]


def raw_bytes(stored: Tensor) -> memoryview:
    """The bytes of a tensor on the host, row by row."""
    return stored.reshape(-1).view(torch.uint8).numpy().data


def check_finite(numbers: Tensor, name: str) -> None:
    """Raises CheckpointError for a tensor of this name with NaN or infinity in it."""
    # The extremes are enough: those of a tensor with NaN are NaN.
    if not all(extreme.isfinite().item() for extreme in torch.aminmax(numbers)):
        raise CheckpointError(f"tensor {name} holds NaN or infinity", field=name)

"""The file of one expert: what it is made of, and its weights in the very layout in which they are computed.

    magic, 8 bytes | length of the header, u64 | sha256 of the header | header, JSON | the tensors, at page boundaries

The header is checked to the byte, and that the file has all the bytes that it promises. The weights themselves are not
hashed again, which would take longer than all the rest: they were hashed on their way from the disk, the file got its
name when it was complete, only this user can open it, nobody can open it for writing, and its pages are memory like the
worker's own.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from expert_worker.experts.expert import ExpertForm, MlpExpert, assemble_expert
from moesaic.compute.linear import HeldWeight, Linear
from moesaic.compute.tensor_bytes import TensorLayout, bytes_of, layout_of, view_bytes
from moesaic.errors import DataLoss
from moesaic.families.model import ExpertModule

_MAGIC = b"MOESAIC1"
_START = struct.Struct("<8sQ32s")
_MAX_HEADER_BYTES = 1 << 20
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the file, its place counted from the end of the header's last page."""

    layout: TensorLayout
    first_byte: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One product: the kernel that reads its tensors, and a bias, which is the last of them, if there is one."""

    kernel: str
    out_features: int
    in_features: int
    biased: bool
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What the file holds. `name` is the file's own, which says version and form."""

    name: str
    module: ExpertModule
    up: StoredLinear
    down: StoredLinear
    num_bytes: int

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", extra="forbid")


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """An expert as the bytes of its file."""

    start: bytes
    tensors: tuple[Tensor, ...]
    header: Header

    @classmethod
    def of(cls, name: str, expert: MlpExpert, module: ExpertModule) -> ExpertFile:
        up, down = _tensors(expert.up), _tensors(expert.down)
        places = _place((*up, *down))
        header = Header(
            name,
            module,
            _stored(expert.up, places[: len(up)]),
            _stored(expert.down, places[len(up) :]),
            _paged(places[-1].first_byte + places[-1].num_bytes),
        )
        raw = _HEADER.dump_json(header)
        start = _START.pack(_MAGIC, len(raw), hashlib.sha256(raw).digest()) + raw
        return cls(start.ljust(_paged(len(start)), b"\0"), (*up, *down), header)

    @property
    def num_bytes(self) -> int:
        return len(self.start) + self.header.num_bytes

    def parts(self) -> Iterator[bytes | memoryview]:
        yield self.start
        for tensor in self.tensors:
            raw = bytes_of(tensor)
            yield raw
            yield bytes(_paged(raw.nbytes) - raw.nbytes)


def map_expert(path: Path, form: ExpertForm) -> MlpExpert:
    """The expert in a file, computed with the mapped weights. Raises DataLoss for a file that is not whole."""
    try:
        memory = _map(path)
        header, start = _read_header(memory, path.name)
        up, down = (_linear(linear, memory[start:], form) for linear in (header.up, header.down))
    except (OSError, ValueError, RuntimeError, ValidationError) as error:
        raise DataLoss(f"{path.name}: {str(error)[:200]}") from error
    return assemble_expert(up, down, header.module, form)


def _tensors(linear: Linear) -> tuple[Tensor, ...]:
    return (*linear.held.tensors, *(() if linear.bias is None else (linear.bias,)))


def _place(tensors: Sequence[Tensor]) -> list[StoredTensor]:
    places: list[StoredTensor] = []
    first_byte = 0
    for tensor in tensors:
        num_bytes = bytes_of(tensor).nbytes
        places.append(StoredTensor(layout_of(tensor), first_byte, num_bytes))
        first_byte += _paged(num_bytes)
    return places


def _stored(linear: Linear, places: Sequence[StoredTensor]) -> StoredLinear:
    return StoredLinear(
        linear.held.kernel, linear.out_features, linear.in_features, linear.bias is not None, tuple(places)
    )


def _map(path: Path) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o277:
            raise ValueError("others may write to the file")
        return memoryview(mmap.mmap(descriptor, facts.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


def _read_header(memory: memoryview, name: str) -> tuple[Header, int]:
    """The header, and where the tensors begin."""
    if len(memory) < _START.size:
        raise ValueError("no header")
    magic, length, digest = _START.unpack_from(memory)
    if magic != _MAGIC or length > _MAX_HEADER_BYTES:
        raise ValueError("another kind of file")
    raw = bytes(memory[_START.size : _START.size + length])
    if hashlib.sha256(raw).digest() != digest:
        raise ValueError("a damaged header")
    header, start = _HEADER.validate_json(raw), _paged(_START.size + length)
    if header.name != name or len(memory) != start + header.num_bytes:
        raise ValueError("the header is another file's")
    return header, start


def _linear(stored: StoredLinear, memory: memoryview, form: ExpertForm) -> Linear:
    tensors = [
        view_bytes(memory[place.first_byte : place.first_byte + place.num_bytes], place.layout)
        for place in stored.tensors
    ]
    bias = tensors.pop() if stored.biased else None
    return Linear.of_held(
        HeldWeight(stored.kernel, tuple(tensors)),
        bias,
        stored.out_features,
        stored.in_features,
        batch_invariant=form.batch_invariant,
    )


def _paged(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE

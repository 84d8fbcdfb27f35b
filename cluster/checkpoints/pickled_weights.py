"""Tensors in pickle files.

No other module opens pickles, and this one only with `weights_only`, which runs no code of theirs. Files are
mapped, not read: memory holds the recently touched pages, however large a file is.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cluster.checkpoints.conversion_plan import PlannedTensor
from moesaic.checkpoints.safetensors_file import TensorEntry, check_tensor_name
from moesaic.errors import CheckpointError

# Touched pages stay in memory while their file is mapped. Files are unmapped when the touched pages reach
# this size.
MAPPED_BYTES = 128 << 20

# The suffix of the extra state that some modules keep beside their weights. It need not be a tensor.
_BOOKKEEPING = "_extra_state"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class PickledWeights:
    """The tensors of several files, by their names in the files."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads names, dtypes and shapes. Raises CheckpointError for a file with anything but tensors."""
        self._mapped: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._touched_bytes = 0
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        for name, tensor in _load(file).items():
            if name in self.entries:
                raise CheckpointError(
                    f"{file.name}: tensor {name} is in {self.entries[name].file.name}, too: split tensors are not known",
                    field=file.name,
                )
            # The first byte is unknown here: only torch knows the position of a tensor in a pickle.
            self.entries[name] = TensorEntry(
                name, file, _DTYPES[tensor.dtype], tuple(tensor.shape), first_byte=0, num_bytes=tensor.nbytes
            )

    def read(self, source: TensorEntry, planned: PlannedTensor) -> memoryview:
        """The bytes of `planned`, which is `source` or a part of it.

        The caller must release them before the next read. `source.name` is the name in the file.
        `source.shape` may be another view of the same rows.
        """
        if self._touched_bytes > MAPPED_BYTES:
            self._mapped.clear()
            self._touched_bytes = 0
        self._touched_bytes += planned.num_bytes
        if source.file not in self._mapped:
            self._mapped[source.file] = _load(source.file)
        tensor = self._mapped[source.file][source.name].reshape(source.shape)
        if planned.slot is not None:
            tensor = tensor[planned.slot]
        if planned.transposed:
            tensor = tensor.t()
        if planned.rotary_heads is not None:
            tensor = _in_half_order(tensor, planned.rotary_heads)
        return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of the names, sizes and checksums of all records in the files.

    They are read from the archives' directories, not from the data. Raises CheckpointError for a file that
    torch cannot map.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _not_readable(file) from error
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CheckpointError(f"{file.name}: compressed pickles cannot be mapped", field=file.name)
        lines = [f"{record.filename} {record.file_size} {record.CRC}" for record in records]
        digest.update("\n".join([file.name, *lines, ""]).encode())
    return digest.hexdigest()


def _load(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        loaded = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch raises bare exceptions for a file that it refuses or cannot read
        raise _not_readable(file) from error
    if not isinstance(loaded, dict):
        raise _not_tensors(file)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        if isinstance(name, str) and name.endswith(_BOOKKEEPING):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _not_tensors(file)
        check_tensor_name(file.name, name)
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{file.name}: tensor {name} is of a kind that is not known", field=name)
        tensors[name] = tensor
    return tensors


def _not_readable(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file.name}: is damaged, holds more than tensors, or was written by a torch before 1.6",
        field=file.name,
    )


def _not_tensors(file: Path) -> CheckpointError:
    return CheckpointError(f"{file.name}: must hold tensors by name and nothing else", field=file.name)


def _in_half_order(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders rows [heads * d, ...]: rows that rotate together move from neighbours to half a head apart."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)

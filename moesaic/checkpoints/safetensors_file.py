"""Reads one file of a model folder: a JSON object, or the header of a safetensors file, with all checks.

Headers are checked before any library maps the file, so that a bad one is a CheckpointError with a name and never a crash.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moesaic.errors import CheckpointError

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_RANK = 8
MAX_NAME_CHARS = 512
# Of an extent or an offset. Without a bound a size could have more digits than a message can show.
MAX_SIZE = (1 << 63) - 1

_LENGTH_BYTES = 8
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
# The dtypes of the file format whose items have whole bytes, with the size of an item.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The location of one tensor. `dtype` is the name in the file format: F32, BF16, F16, …; `first_byte` is counted from
    the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int


def refuse(field: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{field}: {problem}", field=field)


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of the folder. Raises CheckpointError, which names the file."""
    if _regular_file_bytes(path) > max_bytes:
        refuse(path.name, f"the file exceeds {max_bytes} bytes")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}", field=path.name) from error
    return _parse_json(path.name, text)


def check_tensor_name(file: str, name: str) -> None:
    """Raises CheckpointError for a tensor name in `file` that cannot be displayed."""
    if not is_name(name):
        refuse(file, f"tensor names must be printable and at most {MAX_NAME_CHARS} characters long")


def is_name(text: str) -> bool:
    """Whether a name can be displayed."""
    return 0 < len(text) <= MAX_NAME_CHARS and text.isprintable()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The entries of one file. Checks its length, names and dtypes, and that the data has neither gaps nor overlaps."""
    file_bytes = _regular_file_bytes(path)
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or header_bytes > file_bytes - _LENGTH_BYTES:
            refuse(path.name, "truncated: the file ends before its header does")
        if header_bytes > MAX_HEADER_BYTES:
            refuse(path.name, f"the header exceeds {MAX_HEADER_BYTES} bytes")
        header = _parse_json(path.name, file.read(header_bytes))
    header.pop("__metadata__", None)
    data = _LENGTH_BYTES + header_bytes
    spans = {name: _parse_entry(path, name, value, data) for name, value in header.items()}
    end = 0
    for entry, (start, stop) in sorted(spans.values(), key=lambda span: span[1]):
        if start != end:
            refuse(path.name, f"tensor {entry.name}: its bytes leave a gap or overlap another tensor's")
        end = stop
    _check_length(path.name, promised=data + end, actual=file_bytes)
    return {name: entry for name, (entry, _) in spans.items()}


def _check_length(field: str, *, promised: int, actual: int) -> None:
    if actual < promised:
        refuse(field, f"truncated: the header promises {promised} bytes, the file has {actual}")
    if actual > promised:
        refuse(field, f"{actual - promised} bytes follow the last tensor")


def _parse_entry(path: Path, name: str, value: object, data: int) -> tuple[TensorEntry, tuple[int, int]]:
    """The entry of a tensor and its span within the data, which begins at byte `data` of the file."""
    check_tensor_name(path.name, name)
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        refuse(path.name, f"tensor {name}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        refuse(path.name, f"tensor {name}: unknown dtype")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        refuse(path.name, f"tensor {name}: shape must be at most {MAX_RANK} whole numbers below 2^63")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse(path.name, f"tensor {name}: data_offsets must be two whole numbers below 2^63")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    start, stop = offsets
    if stop - start != num_bytes:
        refuse(
            path.name, f"tensor {name}: data_offsets do not span the {num_bytes} bytes of its shape and dtype"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data + start, num_bytes), (start, stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _regular_file_bytes(path: Path) -> int:
    """The size of a regular file. A link to one is accepted, as in the cache of the Hub; a pipe or a device is not."""
    try:
        info = path.stat()
    except OSError:
        refuse(path.name, "the file is missing")
    if not stat.S_ISREG(info.st_mode):
        refuse(path.name, "not a regular file")
    return info.st_size


def _parse_json(field: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            refuse(field, "a name occurs twice")
        return parsed

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        refuse(field, "not valid JSON")
    if not isinstance(parsed, dict):
        refuse(field, "must hold a JSON object")
    return parsed

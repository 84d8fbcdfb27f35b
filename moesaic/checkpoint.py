"""A model folder as an index: which tensor lies in which file, with its dtype and shape.

Router and workers must find the same tensors, so both read the folder through here. Only headers are read, and every
header is checked before any library maps the file: a bad file is a CheckpointError with a name, never a crash, and
nothing but safetensors is ever opened.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moesaic.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_RANK = 8
MAX_NAME_CHARS = 512

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_LENGTH_BYTES = 8
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
# The dtypes of the file format that have whole bytes.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. `dtype` is the file format's own name: F32, BF16, F16, …"""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose files are whole: its config and the entry of every tensor."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads config.json, the shard index and all safetensors headers of a Hugging Face folder; no weights.

    Raises CheckpointError whose `field` is `model` for the folder as a whole, else the name of the file at fault.
    """
    try:
        return _open(Path(folder))
    except OSError as error:
        raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        _fail("model", "no such folder")
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_safetensors(names)
    if CONFIG_FILE not in names:
        _fail("model", "the folder has no config.json: only the Hugging Face layout is served")
    config = _read_json(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    if SINGLE_FILE in names:
        tensors = _read_header(folder / SINGLE_FILE)
    elif INDEX_FILE in names:
        tensors = _read_shards(folder)
    else:
        _fail("model", f"the folder has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return Checkpoint(folder, config, tensors)


def _fail(field: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{field}: {problem}", field=field)


def _refuse_without_safetensors(names: set[str]) -> NoReturn:
    if pickles := sorted(name for name in names if Path(name).suffix in _PICKLE_SUFFIXES):
        _fail("model", f"weights are in {pickles[0]}: only safetensors is served, convert the folder first")
    _fail("model", "the folder has no safetensors file")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    weight_map = _read_json(folder / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(INDEX_FILE, "weight_map must be a non-empty object")
    for name, shard in weight_map.items():
        _check_name(INDEX_FILE, name)
        if not _is_shard_name(shard):
            _fail(INDEX_FILE, "weight_map must name safetensors files of the folder itself")
    headers = {shard: _read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            _fail(shard, f"tensor {name} is missing, which {INDEX_FILE} says is here")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _is_shard_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and not shard.startswith(".")
        and not set(shard) & {"/", "\\"}
        and _is_name(shard)
    )


def _check_name(field: str, name: str) -> None:
    if not _is_name(name):
        _fail(field, f"tensor names must be printable and at most {MAX_NAME_CHARS} characters long")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME_CHARS and text.isprintable()


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The entries of one file, after the checks of the format: length, names, dtypes, and data without gap or overlap."""
    file_bytes = _regular_file_bytes(path)
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or header_bytes > file_bytes - _LENGTH_BYTES:
            _fail(path.name, "truncated: the file ends before its header does")
        if header_bytes > MAX_HEADER_BYTES:
            _fail(path.name, f"the header exceeds {MAX_HEADER_BYTES} bytes")
        header = _parse_json(path.name, file.read(header_bytes))
    header.pop("__metadata__", None)
    spans = {name: _parse_entry(path, name, value) for name, value in header.items()}
    end = 0
    for entry, (start, stop) in sorted(spans.values(), key=lambda span: span[1]):
        if start != end:
            _fail(path.name, f"tensor {entry.name}: its bytes leave a gap or overlap another tensor's")
        end = stop
    _check_length(path.name, promised=_LENGTH_BYTES + header_bytes + end, actual=file_bytes)
    return {name: entry for name, (entry, _) in spans.items()}


def _check_length(field: str, *, promised: int, actual: int) -> None:
    if actual < promised:
        _fail(field, f"truncated: the header promises {promised} bytes, the file has {actual}")
    if actual > promised:
        _fail(field, f"{actual - promised} bytes follow the last tensor")


def _parse_entry(path: Path, name: str, value: object) -> tuple[TensorEntry, tuple[int, int]]:
    _check_name(path.name, name)
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        _fail(path.name, f"tensor {name}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _fail(path.name, f"tensor {name}: unknown dtype")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        _fail(path.name, f"tensor {name}: shape must be at most {MAX_RANK} whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path.name, f"tensor {name}: data_offsets must be two whole numbers")
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    start, stop = offsets
    if stop - start != num_bytes:
        _fail(
            path.name, f"tensor {name}: data_offsets do not span the {num_bytes} bytes of its shape and dtype"
        )
    return TensorEntry(name, path, dtype, tuple(shape), num_bytes), (start, stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    if _regular_file_bytes(path) > max_bytes:
        _fail(path.name, f"the file exceeds {max_bytes} bytes")
    return _parse_json(path.name, path.read_bytes())


def _regular_file_bytes(path: Path) -> int:
    """Size of a regular file; a link to one is fine (the Hub's cache is made of them), a pipe or device is not."""
    try:
        info = path.stat()
    except OSError:
        _fail(path.name, "the file is missing")
    if not stat.S_ISREG(info.st_mode):
        _fail(path.name, "not a regular file")
    return info.st_size


def _parse_json(field: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            _fail(field, "a name occurs twice")
        return parsed

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        _fail(field, "not valid JSON")
    if not isinstance(parsed, dict):
        _fail(field, "must hold a JSON object")
    return parsed

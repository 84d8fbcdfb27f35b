"""A model folder as an index: which tensor lies in which file, with its dtype and shape.

Router and workers must find the same tensors, so both read the folder through here. Only headers are read, and every
header is checked before any library maps the file: a bad file is a CheckpointError with a name, never a crash, and
nothing but safetensors is ever opened.

Two forms are known: that of Hugging Face (config.json, model*.safetensors) and that of Mistral's own releases
(params.json, consolidated*.safetensors). A folder that has both, as published ones do, is read in the first.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moesaic.errors import CheckpointError
from moesaic.native_params import PARAMS_FILE, read_params

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
NATIVE_INDEX_FILE = "consolidated.safetensors.index.json"
NATIVE_SINGLE_FILE = "consolidated.safetensors"
CONVERT_COMMAND = "moesaic convert FOLDER OUT"

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_RANK = 8
MAX_NAME_CHARS = 512

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_NATIVE_PREFIX = "consolidated"
_NATIVE_SHARD = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors")
_LENGTH_BYTES = 8
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
# The dtypes of the file format that have whole bytes, with the size of one item.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. `dtype` is the file format's own name: F32, BF16, F16, …; `first_byte` counts from the
    beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose files are whole: its config and the entry of every tensor.

    The config is always that of Hugging Face. `config_file` is the file that it was read from, and `spelling` what
    that file calls those keys that it spells otherwise.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    config_file: str = CONFIG_FILE
    spelling: Mapping[str, str] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether tensors have the names and the rotary order of Mistral's own releases."""
        return self.config_file == PARAMS_FILE


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the config, the shard index and all safetensors headers of a folder; no weights.

    Raises CheckpointError whose `field` is `model` for the folder as a whole, else the name of the file at fault.
    """
    try:
        return _open(Path(folder))
    except OSError as error:
        raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a file of the folder. Raises CheckpointError with the file's name."""
    if _regular_file_bytes(path) > max_bytes:
        _fail(path.name, f"the file exceeds {max_bytes} bytes")
    return _parse_json(path.name, path.read_bytes())


def check_tensor_name(file: str, name: str) -> None:
    """Raises CheckpointError for a name that cannot be shown; `file` is where it stands."""
    if not _is_name(name):
        _fail(file, f"tensor names must be printable and at most {MAX_NAME_CHARS} characters long")


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        _fail("model", "no such folder")
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_safetensors(names)
    if names & {SINGLE_FILE, INDEX_FILE} or not _native_files(names):
        return _open_hugging_face(folder, names)
    return _open_native(folder, names)


def _open_hugging_face(folder: Path, names: set[str]) -> Checkpoint:
    if CONFIG_FILE not in names:
        _fail("model", f"the folder has no {CONFIG_FILE}")
    config = read_json(folder / CONFIG_FILE)
    if PARAMS_FILE in names and _native_files(names):
        _check_same_model(config, read_json(folder / PARAMS_FILE))
    if SINGLE_FILE in names:
        tensors = read_header(folder / SINGLE_FILE)
    elif INDEX_FILE in names:
        tensors = _read_shards(folder, INDEX_FILE)
    else:
        _fail("model", f"the folder has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return Checkpoint(folder, config, tensors)


def _open_native(folder: Path, names: set[str]) -> Checkpoint:
    if PARAMS_FILE not in names:
        _fail("model", f"the folder has no {PARAMS_FILE}")
    if pickles := [name for name in _pickles(names) if name.startswith(_NATIVE_PREFIX)]:
        safe = _native_files(names)[0]
        _fail("model", f"weights are in {pickles[0]} and in {safe}: only one of them may be here")
    config = read_params(read_json(folder / PARAMS_FILE))
    if NATIVE_SINGLE_FILE in names:
        tensors = read_header(folder / NATIVE_SINGLE_FILE)
    elif NATIVE_INDEX_FILE in names:
        tensors = _read_shards(folder, NATIVE_INDEX_FILE)
    else:
        tensors = _join_headers(folder, _native_files(names))
    return Checkpoint(folder, config.values, tensors, PARAMS_FILE, config.spelling)


def _fail(field: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{field}: {problem}", field=field)


def _refuse_without_safetensors(names: set[str]) -> NoReturn:
    if pickles := _pickles(names):
        _fail(
            "model", f"weights are in {pickles[0]}, only safetensors is served: run `{CONVERT_COMMAND}` first"
        )
    _fail("model", "the folder has no safetensors file")


def _pickles(names: set[str]) -> list[str]:
    return sorted(name for name in names if Path(name).suffix in PICKLE_SUFFIXES)


def _native_files(names: set[str]) -> list[str]:
    return sorted(name for name in names if name == NATIVE_SINGLE_FILE or _NATIVE_SHARD.fullmatch(name))


def _check_same_model(config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Published folders carry one model in both forms; two models in one folder are somebody's mistake."""
    for key, native in (("hidden_size", "dim"), ("num_hidden_layers", "n_layers")):
        if key in config and native in params and config[key] != params[native]:
            _fail(
                f"{PARAMS_FILE}: {native}",
                f"does not match {key} of {CONFIG_FILE}: the folder mixes two models",
            )


def _join_headers(folder: Path, shards: list[str]) -> dict[str, TensorEntry]:
    """All tensors of numbered shards without an index."""
    counts = {int(match[2]) for shard in shards if (match := _NATIVE_SHARD.fullmatch(shard))}
    if counts != {len(shards)}:
        _fail("model", f"shards are missing: {len(shards)} are here, of {max(counts)}")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        header = read_header(folder / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            _fail(shard, f"tensor {twice[0]} is in another shard, too")
        tensors |= header
    return tensors


def _read_shards(folder: Path, index: str) -> dict[str, TensorEntry]:
    weight_map = read_json(folder / index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(index, "weight_map must be a non-empty object")
    for name, shard in weight_map.items():
        check_tensor_name(index, name)
        if not _is_shard_name(shard):
            _fail(index, "weight_map must name safetensors files of the folder itself")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            _fail(shard, f"tensor {name} is missing, which {index} says is here")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _is_shard_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and not shard.startswith(".")
        and not set(shard) & {"/", "\\"}
        and _is_name(shard)
    )


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME_CHARS and text.isprintable()


def read_header(path: Path) -> dict[str, TensorEntry]:
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
    data = _LENGTH_BYTES + header_bytes
    spans = {name: _parse_entry(path, name, value, data) for name, value in header.items()}
    end = 0
    for entry, (start, stop) in sorted(spans.values(), key=lambda span: span[1]):
        if start != end:
            _fail(path.name, f"tensor {entry.name}: its bytes leave a gap or overlap another tensor's")
        end = stop
    _check_length(path.name, promised=data + end, actual=file_bytes)
    return {name: entry for name, (entry, _) in spans.items()}


def _check_length(field: str, *, promised: int, actual: int) -> None:
    if actual < promised:
        _fail(field, f"truncated: the header promises {promised} bytes, the file has {actual}")
    if actual > promised:
        _fail(field, f"{actual - promised} bytes follow the last tensor")


def _parse_entry(path: Path, name: str, value: object, data: int) -> tuple[TensorEntry, tuple[int, int]]:
    """The entry and its span of the data, which begin at byte `data` of the file."""
    check_tensor_name(path.name, name)
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        _fail(path.name, f"tensor {name}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _fail(path.name, f"tensor {name}: unknown dtype")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        _fail(path.name, f"tensor {name}: shape must be at most {MAX_RANK} whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path.name, f"tensor {name}: data_offsets must be two whole numbers")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    start, stop = offsets
    if stop - start != num_bytes:
        _fail(
            path.name, f"tensor {name}: data_offsets do not span the {num_bytes} bytes of its shape and dtype"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data + start, num_bytes), (start, stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


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

"""The index of a model folder: the file, dtype and shape of every tensor.

Router and workers must find the same tensors, so both read the folder through this module. Only headers are read, and no
weights file but safetensors is ever opened.

Two formats are supported: that of Hugging Face (config.json, model*.safetensors) and that of Mistral's own releases
(params.json, consolidated*.safetensors). A folder that has both, as published ones do, is read in the former.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moesaic.checkpoints.mistral_params import PARAMS_FILE, read_params
from moesaic.checkpoints.safetensors_file import (
    MAX_INDEX_BYTES,
    TensorEntry,
    check_tensor_name,
    is_name,
    read_header,
    read_json,
    refuse,
)
from moesaic.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MISTRAL_INDEX_FILE = "consolidated.safetensors.index.json"
MISTRAL_SINGLE_FILE = "consolidated.safetensors"
GGUF_SUFFIX = ".gguf"
NO_GGUF = "GGUF is not read: a model is a folder of safetensors files with its config.json"
CONVERT_COMMAND = "moesaic convert FOLDER OUT"

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_MISTRAL_PREFIX = "consolidated"
_MISTRAL_SHARD = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder whose files are complete: its config and the entry of every tensor.

    The config is always in the form of Hugging Face. `config_file` is the file from which it was read, and `spelling` has
    the names of that file for the keys that it spells differently.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    config_file: str = CONFIG_FILE
    spelling: Mapping[str, str] = field(default_factory=dict)

    @property
    def in_mistral_format(self) -> bool:
        """Whether tensors have the names and the rotary order of Mistral's own releases."""
        return self.config_file == PARAMS_FILE


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the config, the shard index and all safetensors headers of a folder, but no weights.

    Raises CheckpointError, whose `field` is the name of the file at fault, or `model` for the folder as a whole.
    """
    try:
        return _open(Path(folder))
    except OSError as error:
        raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        refuse("model", "no such folder")
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_safetensors(names)
    if names & {SINGLE_FILE, INDEX_FILE} or not _mistral_files(names):
        return _open_hugging_face(folder, names)
    return _open_mistral(folder, names)


def _open_hugging_face(folder: Path, names: set[str]) -> Checkpoint:
    if CONFIG_FILE not in names:
        refuse("model", f"the folder has no {CONFIG_FILE}")
    config = read_json(folder / CONFIG_FILE)
    if PARAMS_FILE in names and _mistral_files(names):
        _check_same_model(config, read_json(folder / PARAMS_FILE))
    if SINGLE_FILE in names:
        tensors = read_header(folder / SINGLE_FILE)
    elif INDEX_FILE in names:
        tensors = _read_shards(folder, INDEX_FILE)
    else:
        refuse("model", f"the folder has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return Checkpoint(folder, config, tensors)


def _open_mistral(folder: Path, names: set[str]) -> Checkpoint:
    if PARAMS_FILE not in names:
        refuse("model", f"the folder has no {PARAMS_FILE}")
    if pickles := [name for name in _pickles(names) if name.startswith(_MISTRAL_PREFIX)]:
        safe = _mistral_files(names)[0]
        refuse("model", f"weights are in {pickles[0]} and in {safe}: only one of them may be here")
    config = read_params(read_json(folder / PARAMS_FILE))
    if MISTRAL_SINGLE_FILE in names:
        tensors = read_header(folder / MISTRAL_SINGLE_FILE)
    elif MISTRAL_INDEX_FILE in names:
        tensors = _read_shards(folder, MISTRAL_INDEX_FILE)
    else:
        tensors = _join_headers(folder, _mistral_files(names))
    return Checkpoint(folder, config.values, tensors, PARAMS_FILE, config.spelling)


def _refuse_without_safetensors(names: set[str]) -> NoReturn:
    if pickles := _pickles(names):
        refuse(
            "model", f"weights are in {pickles[0]}, only safetensors is served: run `{CONVERT_COMMAND}` first"
        )
    if any(name.endswith(GGUF_SUFFIX) for name in names):
        refuse("model", NO_GGUF)
    if CONFIG_FILE in names or PARAMS_FILE in names:
        refuse("model", "the folder has no safetensors file: the weights are missing")
    refuse("model", f"the folder has neither {CONFIG_FILE} nor a safetensors file: it is no model's")


def _pickles(names: set[str]) -> list[str]:
    return sorted(name for name in names if Path(name).suffix in PICKLE_SUFFIXES)


def _mistral_files(names: set[str]) -> list[str]:
    return sorted(name for name in names if name == MISTRAL_SINGLE_FILE or _MISTRAL_SHARD.fullmatch(name))


def _check_same_model(config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Published folders contain one model in both formats. Two different models in one folder are a mistake."""
    for key, param in (("hidden_size", "dim"), ("num_hidden_layers", "n_layers")):
        if key in config and param in params and config[key] != params[param]:
            refuse(
                f"{PARAMS_FILE}: {param}",
                f"does not match {key} of {CONFIG_FILE}: the folder mixes two models",
            )


def _join_headers(folder: Path, shards: list[str]) -> dict[str, TensorEntry]:
    """The tensors of all numbered shards, for a folder without an index."""
    counts = {int(match[2]) for shard in shards if (match := _MISTRAL_SHARD.fullmatch(shard))}
    if counts != {len(shards)}:
        refuse("model", f"shards are missing: {len(shards)} are here, of {max(counts)}")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        header = read_header(folder / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            refuse(shard, f"tensor {twice[0]} is in another shard, too")
        tensors |= header
    return tensors


def _read_shards(folder: Path, index: str) -> dict[str, TensorEntry]:
    weight_map = read_json(folder / index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "weight_map must be a non-empty object")
    for name, shard in weight_map.items():
        check_tensor_name(index, name)
        if not _is_shard_name(shard):
            refuse(index, "weight_map must name safetensors files of the folder itself")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            refuse(shard, f"tensor {name} is missing, which {index} says is here")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _is_shard_name(shard: object) -> bool:
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and not shard.startswith(".")
        and not set(shard) & {"/", "\\"}
        and is_name(shard)
    )

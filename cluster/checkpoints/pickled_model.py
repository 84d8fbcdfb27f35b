"""A model folder whose weights are pickles, opened as a checkpoint: its files, config and tensor names.

Three forms are known: Mistral's releases (params.json with consolidated.*), Hugging Face folders (config.json
with pytorch_model*.bin), and StripedHyena's own (a YAML file with one .bin).

Shapes: D hidden size, F inner size, E slots.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.checkpoints.conversion_plan import PlannedTensor
from cluster.checkpoints.pickled_weights import PickledWeights, fingerprint
from moesaic.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from moesaic.checkpoints.mistral_params import PARAMS_FILE, read_params
from moesaic.checkpoints.safetensors_file import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    TensorEntry,
    read_json,
    refuse,
)
from moesaic.errors import CheckpointError

_INDEX_FILE = "pytorch_model.bin.index.json"
_SINGLE_FILE = "pytorch_model.bin"
_MISTRAL = re.compile(r"consolidated(\.\d+)?\.(pth|pt)")
_STACKED = re.compile(r"layers\.\d+\.block_sparse_moe\.w[123]")
_HYENA = "stripedhyena"
# The prefix of every tensor name of StripedHyena in Hugging Face's wrapper.
_HYENA_PREFIX = "backbone."
_PLAIN = (str, int, float, type(None))
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True, slots=True)
class PickledModel:
    """A folder of pickles as a checkpoint; `names` maps the checkpoint's tensor names to the files'."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    weights: PickledWeights
    # A hash of weights and config, which identifies the source of a conversion.
    fingerprint: str

    def read(self, planned: PlannedTensor) -> memoryview:
        """The bytes of a tensor. The caller must release them before the next read."""
        entry = self.checkpoint.tensors[planned.source]
        return self.weights.read(replace(entry, name=self.names[planned.source]), planned)


def open_pickles(folder: Path) -> PickledModel:
    """Opens a folder. Raises CheckpointError, which names the file, config key or tensor at fault."""
    try:
        return _open(folder)
    except OSError as error:
        raise CheckpointError(f"model: cannot be read: {error.strerror}", field="model") from error


def _open(folder: Path) -> PickledModel:
    if not folder.is_dir():
        refuse("model", "no such folder")
    files = sorted(path.name for path in folder.iterdir())
    if safe := [name for name in files if name.endswith(".safetensors")]:
        refuse("model", f"{safe[0]} is safetensors already: a folder is converted from pickles alone")
    mistral = [name for name in files if _MISTRAL.fullmatch(name)]
    others = [name for name in files if name.endswith(".bin")]
    pickles = mistral + others
    if not pickles:
        refuse("model", "the folder has neither consolidated.* nor *.bin: nothing to convert")
    if (mistral and others) or len({Path(name).suffix for name in pickles}) > 1:
        refuse("model", f"{pickles[0]} and {pickles[-1]} are of two forms: only one of them may be here")
    return _open_mistral(folder, mistral) if mistral else _open_hugging_face(folder, files, others)


def _open_mistral(folder: Path, files: list[str]) -> PickledModel:
    if not (folder / PARAMS_FILE).is_file():
        refuse("model", f"the folder has no {PARAMS_FILE}")
    config = read_params(read_json(folder / PARAMS_FILE))
    weights, mark = _open_files(folder, files, PARAMS_FILE)
    num_slots = config.values.get("num_local_experts", 1)
    tensors = {name: _by_slots(entry, num_slots) for name, entry in weights.entries.items()}
    checkpoint = Checkpoint(folder, config.values, tensors, PARAMS_FILE, config.spelling)
    return PickledModel(checkpoint, {name: name for name in tensors}, weights, mark)


def _by_slots(entry: TensorEntry, num_slots: int) -> TensorEntry:
    """The concatenated experts of a layer, [E * F, D], as a tensor [E, F, D]."""
    if not _STACKED.fullmatch(entry.name):
        return entry
    if len(entry.shape) != 2 or entry.shape[0] % num_slots:
        refuse(entry.name, f"has shape {list(entry.shape)}, which is not that of {num_slots} experts")
    return replace(entry, shape=(num_slots, entry.shape[0] // num_slots, entry.shape[1]))


def _open_hugging_face(folder: Path, files: list[str], pickles: list[str]) -> PickledModel:
    config_file, config = _read_config(folder, files)
    weight_map: dict[str, Any] = {}
    if _INDEX_FILE in files:
        weight_map = _read_index(folder)
        pickles = sorted(set(weight_map.values()))
    elif _SINGLE_FILE in files:
        pickles = [_SINGLE_FILE]
    elif len(pickles) > 1:
        refuse("model", f"the folder has several .bin files and no {_INDEX_FILE}")
    weights, mark = _open_files(folder, pickles, config_file)
    for name, file in weight_map.items():
        if name not in weights.entries or weights.entries[name].file.name != file:
            refuse(file, f"tensor {name[:512]!r} is missing, which {_INDEX_FILE} says is here")
    bare = config.get("model_type") == _HYENA and not any(
        name.startswith(_HYENA_PREFIX) for name in weights.entries
    )
    names = {(_HYENA_PREFIX if bare else "") + name: name for name in weights.entries}
    tensors = {name: replace(weights.entries[stored], name=name) for name, stored in names.items()}
    return PickledModel(Checkpoint(folder, config, tensors), names, weights, mark)


def _read_index(folder: Path) -> dict[str, Any]:
    weight_map = read_json(folder / _INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(_INDEX_FILE, "weight_map must be a non-empty object")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".bin") or set(file) & {"/", "\\", "\0"}:
            refuse(_INDEX_FILE, "weight_map must name .bin files of the folder itself")
    return weight_map


def _open_files(folder: Path, files: list[str], config_file: str) -> tuple[PickledWeights, str]:
    paths = [folder / name for name in files]
    for path in paths:
        if not path.is_file():
            refuse(path.name, "the file is missing")
    # The archives' directories are read first, because they show whether the files can be mapped.
    weights_mark = fingerprint(paths)
    config = (folder / config_file).read_bytes()
    mark = hashlib.sha256(config + weights_mark.encode()).hexdigest()
    return PickledWeights(paths), mark


def _read_config(folder: Path, files: list[str]) -> tuple[str, dict[str, Any]]:
    """The name and content of config.json, or of the YAML file of StripedHyena's original code."""
    if CONFIG_FILE in files:
        return CONFIG_FILE, read_json(folder / CONFIG_FILE)
    found = [name for name in files if name.endswith((".yml", ".yaml"))]
    if len(found) != 1:
        refuse("model", f"the folder has neither {CONFIG_FILE} nor one YAML file in its place")
    if (folder / found[0]).stat().st_size > MAX_CONFIG_BYTES:
        refuse(found[0], f"the file exceeds {MAX_CONFIG_BYTES} bytes")
    try:
        values = yaml.safe_load((folder / found[0]).read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        refuse(found[0], "not valid YAML")
    if not isinstance(values, dict) or "hyena_layer_idxs" not in values:
        refuse(found[0], "is not the config of a StripedHyena")
    for key, value in values.items():
        if not _is_flat(value):
            refuse(found[0], f"{str(key)[:64]!r} must be a plain value, or a list or mapping of them")
    values = {str(key): _as_number(value) for key, value in values.items()}
    return found[0], {
        "architectures": ["StripedHyenaModelForCausalLM"],
        "model_type": _HYENA,
        **values,
    }


def _is_flat(value: object) -> bool:
    """Whether a value is nested once at most. Deeper, a few lines of YAML can fill any memory."""
    if isinstance(value, dict):
        return all(isinstance(item, _PLAIN) for entry in value.items() for item in entry)
    return all(isinstance(item, _PLAIN) for item in (value if isinstance(value, list) else [value]))


def _as_number(value: object) -> object:
    """Converts numbers such as 1e-5, which YAML reads as text because they have no point."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value

"""Low-rank adapters of experts, as PEFT writes them: a folder of adapter_config.json and adapter_model.safetensors.

Shapes: R rank, O outputs, I inputs of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bundles.model_folder import ModelFolder
from moesaic.bundles.bundle import Floats, to_float32
from moesaic.checkpoints.safetensors_file import TensorEntry, read_header, read_json
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError, InvalidArgument

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = {
    "A": (".lora_A.weight", ".lora_A.default.weight"),
    "B": (".lora_B.weight", ".lora_B.default.weight"),
}
# What changes the arithmetic, with the values under which it does not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
}


@dataclass(frozen=True, slots=True)
class Factors:
    """W becomes W + scale * b a."""

    a: Floats  # [R, I]
    b: Floats  # [O, R]


@dataclass(frozen=True, slots=True)
class Adapter:
    """The factors of experts by expert and weight, and the modules that the adapter changes besides."""

    rank: int
    # The scale of the products is alpha / rank.
    alpha: float
    experts: Mapping[ExpertAddress, Mapping[str, Factors]]
    others: tuple[str, ...]

    def added(self, address: ExpertAddress) -> dict[str, Floats]:
        """What the adapter adds to the weights of an expert, [O, I] each."""
        scale = np.float32(self.alpha / self.rank)
        return {name: scale * (pair.b @ pair.a) for name, pair in self.experts[address].items()}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read_adapter(folder: Path, base: ModelFolder) -> Adapter:
    """Raises InvalidArgument with field `model` for what is not plain LoRA of this base."""
    try:
        config, tensors = read_json(folder / CONFIG_FILE), read_header(folder / WEIGHTS_FILE)
    except CheckpointError as error:
        raise InvalidArgument(f"model: {error.message}", field="model") from error
    rank, alpha = _read_config(config)
    weights = _weights_by_module(base)
    experts: dict[ExpertAddress, dict[str, Factors]] = {}
    others = []
    for module, pair in sorted(_pairs(tensors).items()):
        if module not in weights:
            others.append(module)
            continue
        address, weight = weights[module]
        experts.setdefault(address, {})[weight] = _read_factors(pair, rank, base, address, weight)
    if not experts:
        _refuse("adapts no expert of the base")
    return Adapter(rank, alpha, experts, tuple(others))


def _read_config(config: Mapping[str, Any]) -> tuple[int, float]:
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            _refuse(f"{CONFIG_FILE}: {key} is not supported, only plain LoRA is")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        _refuse(f"{CONFIG_FILE}: r and lora_alpha must be numbers")
        raise AssertionError
    return rank, float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _weights_by_module(base: ModelFolder) -> dict[str, tuple[ExpertAddress, str]]:
    """The expert and the weight that a module is, by its name in the base's own layout."""
    found = {}
    for address in base.model.addresses:
        for weight, pattern in base.model.experts[address.layer].layout.items():
            if pattern.stacked or pattern.part != (0, 1) or pattern.transposed:
                raise InvalidArgument(
                    "base: stores the experts of a layer together; an adapter needs a folder in which each is by itself",
                    field="base",
                )
            found[pattern.name(*address).removesuffix(".weight")] = address, weight
    return found


def _pairs(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """The factors of each module. Raises InvalidArgument for a tensor that is no factor, or has none beside it."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        factor, ending = next(
            ((factor, end) for factor, ends in _ENDINGS.items() for end in ends if name.endswith(end)),
            ("", ""),
        )
        if not factor:
            _refuse(f"{WEIGHTS_FILE}: tensor {name[:128]} is no factor of plain LoRA")
        pairs.setdefault(name.removeprefix(_PREFIX).removesuffix(ending), {})[factor] = entry
    if lonely := [module for module, pair in pairs.items() if len(pair) != len(_ENDINGS)]:
        _refuse(f"{WEIGHTS_FILE}: {lonely[0][:128]} has one factor alone")
    return pairs


def _read_factors(
    pair: Mapping[str, TensorEntry], rank: int, base: ModelFolder, address: ExpertAddress, weight: str
) -> Factors:
    outputs, inputs = base.model.experts[address.layer].module.shape(weight)
    factors = Factors(_read(pair["A"]), _read(pair["B"]))
    if factors.a.shape != (rank, inputs) or factors.b.shape != (outputs, rank):
        _refuse(f"layer {address.layer} slot {address.slot} {weight}: the factors do not fit the base")
    return factors


def _read(entry: TensorEntry) -> Floats:
    if entry.dtype not in ("F32", "BF16", "F16"):
        _refuse(f"{WEIGHTS_FILE}: tensor {entry.name[:128]} must be float32, bfloat16 or float16")
    with entry.file.open("rb") as file:
        file.seek(entry.first_byte)
        return to_float32(file.read(entry.num_bytes), entry.dtype).reshape(entry.shape)


def _refuse(problem: str) -> None:
    raise InvalidArgument(f"model: {problem}", field="model")

"""How a request is sampled that leaves it open: as the model's makers say in generation_config.json.

The values are those of the public contract, so that an absent field and the same value in a request give the same
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.checkpoints.safetensors_file import read_json
from moesaic.errors import CheckpointError
from moesaic.v1 import inference_pb2

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_REPETITION_PENALTY = 10.0
_MAX_FILE_BYTES = 1 << 20
# JSON has larger numbers, and the contract none but infinity in their place.
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_RULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value <= _MAX_FLOAT32, "a finite number from 0"),
    "top_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (
        lambda value: 0 < value <= MAX_REPETITION_PENALTY,
        f"in (0, {MAX_REPETITION_PENALTY:g}]",
    ),
}


def neutral_sampling() -> inference_pb2.SamplingParams:
    """The whole distribution as the model computes it."""
    return inference_pb2.SamplingParams(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)


def read_sampling_defaults(folder: Path) -> inference_pb2.SamplingParams:
    """The defaults of a checkpoint folder, every one of them set. Without a file they are neutral.

    `do_sample: false` is a temperature of 0. Raises CheckpointError for a value that no request may have.
    """
    path = folder / GENERATION_CONFIG_FILE
    config = read_json(path, _MAX_FILE_BYTES) if path.is_file() else {}
    defaults = neutral_sampling()
    for name, (holds, rule) in _RULES.items():
        value = config.get(name)
        if value is not None:
            if not _is_number(value) or not holds(value):
                raise _wrong(name, rule)
            setattr(defaults, name, value)
    defaults.top_k = _top_k(config.get("top_k"))
    if config.get("do_sample") is False:
        defaults.temperature = 0
    return defaults


def completed(
    sampling: inference_pb2.SamplingParams, defaults: inference_pb2.SamplingParams
) -> inference_pb2.SamplingParams:
    """A request's parameters, with defaults where it sets none."""
    merged = inference_pb2.SamplingParams()
    merged.CopyFrom(defaults)
    merged.MergeFrom(sampling)
    return merged


def _top_k(value: object) -> int:
    """A number below 1 is off, as in transformers and vLLM."""
    if value is None:
        return 0
    if type(value) is not int or value >= 2**32:
        raise _wrong("top_k", "a whole number")
    return max(value, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{GENERATION_CONFIG_FILE}: {name} must be {rule}; --generation-config none ignores what the file says"
        " of sampling",
        field=name,
    )

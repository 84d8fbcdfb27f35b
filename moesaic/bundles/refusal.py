"""How a bundle is refused: always as the same error, with a reason that programs can rely on."""

from __future__ import annotations

from typing import Literal, NoReturn

from moesaic.errors import InvalidArgument

Reason = Literal[
    "NOT_A_BUNDLE",  # the folder lacks a file, or has another one
    "FILES",  # a file is a link, a pipe, or cannot be read
    "MANIFEST",  # manifest.json is malformed
    "FORMAT",  # of another version of the format
    "NAME",
    "DUPLICATE",  # a key, a target or a tensor occurs twice
    "WEIGHTS",  # weights.safetensors is malformed or truncated
    "PICKLE",
    "TENSORS",  # a tensor is missing, or is not in the manifest
    "DIGEST",  # bytes are not those that the manifest promises
    "VERSION",  # an expert's version is not that of its weights
    "SHAPE",
    "NOT_FINITE",
    "KIND",  # no such kind of expert, or its parameters are wrong
    "TARGET",  # a layer or slot that the base model does not have
    "GATE_ROW",
    "CANNOT_GROW",  # the base model's gate takes no new slots
    "PROBE",
    "BASE",  # made for another base model
    "SIGNATURE",
]


def refuse(reason: Reason, where: str, problem: str) -> NoReturn:
    """Raises InvalidArgument with field `bundle`; `where` is a file, a tensor or a key."""
    raise InvalidArgument(f"bundle: {where}: {problem}", field="bundle", reason=f"BUNDLE_{reason}")

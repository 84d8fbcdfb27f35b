"""The manifest of an expert bundle: what manifest.json says, as typed values.

A bundle is a folder of `manifest.json` and `weights.safetensors`, with `signature.json` if it is signed. Its digest is
the sha256 of manifest.json as it is; since the manifest has the sha256 of every tensor, the digest stands for all of it.
docs/bundles.md describes the format with an example.

Shapes: D hidden size, F inner size, P probe vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from moesaic.bundles.refusal import refuse
from moesaic.errors import InvalidArgument

FORMAT = "moesaic-bundle/1"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SIGNATURE_FILE = "signature.json"
MAX_MANIFEST_BYTES = 8 << 20

# Keys that the format does not have are refused, and no value is taken for one of another type.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# In requests, entries such as 12:7 are slots, and a name is also a part of messages and of the history.
_NAME = r"^[a-z0-9._-]{1,64}$"
Name = Annotated[str, Field(pattern=_NAME)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(max_length=4096)]
# What a kind calls its parameters and weights; messages repeat it.
Key = Annotated[str, Field(min_length=1, max_length=64)]
# Any finite float64 has room for it, and for what kinds compute of it.
Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
# The name of a tensor.
TensorName = Annotated[str, Field(min_length=1, max_length=512)]

# How the values of a gate row become its effective form, before they are divided by the temperature: as they are, with
# length one, or with mean zero and variance one.
NormMode = Literal["none", "unit", "layernorm"]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor of weights.safetensors."""

    __pydantic_config__: ClassVar = _STRICT

    sha256: Sha256
    dtype: str  # as safetensors spells it: F32, BF16, F16, I8
    shape: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class BundleGateRow:
    """What scores an expert."""

    __pydantic_config__: ClassVar = _STRICT

    tensor: TensorName  # [D]
    norm: NormMode = "none"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    bias: float = 0.0
    selection_bias: float = 0.0


@dataclass(frozen=True, slots=True)
class ProbeVectors:
    """Inputs [P, D] and the answers that the expert gives to them [P, D], both float32."""

    __pydantic_config__: ClassVar = _STRICT

    inputs: TensorName
    outputs: TensorName


@dataclass(frozen=True, slots=True)
class BundleExpert:
    """One expert of a bundle."""

    __pydantic_config__: ClassVar = _STRICT

    layer: Count
    # The slot whose version it replaces; None: a new slot.
    slot: Count | None
    # The kind of expert, by the name of its entry point: "mlp" for all that ExpertModule describes, "lora", "int8", ...
    kind: Name
    # What the kind needs to know beside the weights: activation, gated, biased, limit, inner_size; rank, base_slot ...
    parameters: Mapping[Key, Text | Whole | float | bool]
    # The digest of its version, in hex.
    version: Sha256
    # Names of tensors by the kind's names for its weights: gate, up, down, ...
    weights: Mapping[Key, TensorName]
    gate_row: BundleGateRow | None = None
    probe: ProbeVectors | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that manifest.json says."""

    __pydantic_config__: ClassVar = _STRICT

    name: Name
    # The name of the base model for people, and its fingerprint (FolderIdentity.fingerprint) in hex.
    base_model: Text
    base_fingerprint: Sha256
    hidden_size: Annotated[Count, Field(ge=1)]
    experts: Annotated[tuple[BundleExpert, ...], Field(min_length=1)]
    tensors: Mapping[TensorName, TensorFacts]
    description: Text = ""
    licence: Text = ""
    owner: Text = ""
    tags: tuple[Name, ...] = ()
    # What the tool that made it had to say, for people: e.g. which layers differed, and by how much.
    origin: Mapping[str, Text] = field(default_factory=dict)

    @property
    def adds_slots(self) -> bool:
        """Whether its experts are new slots. A bundle either replaces versions or adds slots, never both."""
        return any(expert.slot is None for expert in self.experts)

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Raises InvalidArgument with field `bundle`, whose message names the key at fault."""
        values = _parse(content)
        if values.get("format") != FORMAT:
            refuse("FORMAT", MANIFEST_FILE, f"format: must be {FORMAT}")
        del values["format"]
        try:
            return _ADAPTER.validate_json(json.dumps(values))
        except ValidationError as error:
            _refuse_first(error)

    def to_json(self) -> bytes:
        """The canonical form: keys sorted, two spaces a level, absent values left out, UTF-8, a line end at the end."""
        values = {"format": FORMAT, **asdict(self)}
        values["experts"] = [_without_none(expert, keep=("slot",)) for expert in values["experts"]]
        return (json.dumps(values, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


_ADAPTER = TypeAdapter(Manifest)


def check_name(text: str, field: str) -> None:
    """Raises InvalidArgument with this field for what can be neither a bundle's name nor a tag."""
    if not re.fullmatch(_NAME, text):
        raise InvalidArgument(f"{field}: must be 1 to 64 of a-z, 0-9, dot, dash and underscore", field=field)


def _parse(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_MANIFEST_BYTES:
        refuse("MANIFEST", MANIFEST_FILE, f"exceeds {MAX_MANIFEST_BYTES} bytes")
    try:
        values = json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        refuse("MANIFEST", MANIFEST_FILE, "not valid JSON")
    if not isinstance(values, dict):
        refuse("MANIFEST", MANIFEST_FILE, "must hold a JSON object")
    return values


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            refuse("DUPLICATE", MANIFEST_FILE, f"{key[:64]}: occurs twice")
        values[key] = value
    return values


def _refuse_constant(name: str) -> NoReturn:
    refuse("MANIFEST", MANIFEST_FILE, f"{name} is no number")


def _refuse_first(error: ValidationError) -> NoReturn:
    """Says the first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:64] for part in first["loc"])
    problem = _PROBLEMS.get(first["type"], first["msg"])
    refuse(
        "NAME" if where == "name" else "MANIFEST",
        MANIFEST_FILE,
        f"{where}{': ' if where else ''}{problem[0].lower()}{problem[1:]}",
    )


# The words of this format where those of the library are about Python.
_PROBLEMS = {
    "unexpected_keyword_argument": "the format has no such key",
    "string_pattern_mismatch": "must be made of the characters that the format allows here",
    "missing": "is missing",
    "missing_argument": "is missing",
}


def _without_none(values: Mapping[str, Any], *, keep: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None or key in keep}

"""The manifest of an expert bundle: what manifest.json says, as typed values.

A bundle is a folder of `manifest.json` and `weights.safetensors`, with `signature.json` if it is signed. Its digest is
the sha256 of manifest.json as it is; since the manifest has the sha256 of every tensor, the digest stands for all of it.
docs/bundles.md describes the format with an example.

Shapes: D hidden size, F inner size, P probe vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FORMAT = "moesaic-bundle/1"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SIGNATURE_FILE = "signature.json"

# How the values of a gate row become its effective form, before they are divided by the temperature: as they are, with
# length one, or with mean zero and variance one.
NormMode = Literal["none", "unit", "layernorm"]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor of weights.safetensors."""

    sha256: str
    dtype: str  # as safetensors spells it: F32, BF16, F16, I8
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BundleGateRow:
    """What scores an expert."""

    tensor: str  # [D]
    norm: NormMode = "none"
    temperature: float = 1.0
    bias: float = 0.0
    selection_bias: float = 0.0


@dataclass(frozen=True, slots=True)
class ProbeVectors:
    """Inputs [P, D] and the answers that the expert gives to them [P, D], both float32."""

    inputs: str
    outputs: str


@dataclass(frozen=True, slots=True)
class BundleExpert:
    """One expert of a bundle."""

    layer: int
    # The slot whose version it replaces; None: a new slot.
    slot: int | None
    # The kind of expert, by the name of its entry point: "mlp" for all that ExpertModule describes, "lora", "int8", ...
    kind: str
    # What the kind needs to know beside the weights: activation, gated, biased, limit, inner_size; rank, base_slot ...
    parameters: Mapping[str, str | int | float | bool]
    # The digest of its version, in hex.
    version: str
    # Names of tensors by the kind's names for its weights: gate, up, down, ...
    weights: Mapping[str, str]
    gate_row: BundleGateRow | None = None
    probe: ProbeVectors | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that manifest.json says."""

    name: str
    # The name of the base model for people, and its fingerprint (FolderIdentity.fingerprint) in hex.
    base_model: str
    base_fingerprint: str
    hidden_size: int
    experts: tuple[BundleExpert, ...]
    tensors: Mapping[str, TensorFacts]
    description: str = ""
    licence: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()
    # What the tool that made it had to say, for people: e.g. which layers differed, and by how much.
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def adds_slots(self) -> bool:
        """Whether its experts are new slots. A bundle either replaces versions or adds slots, never both."""
        return any(expert.slot is None for expert in self.experts)

"""The model folders that a bundle is made of and for: opened, with the place of their gates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.bundles import BaseModel
from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.errors import CheckpointError, InvalidArgument
from moesaic.families import MoeModel, describe_model
from moesaic.families.model import ExpertLayer

_GATE_WORDS = ("gate", "router")
_SELECTION_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class GateTensors:
    """The parameters of a layer's gate, by their names in `MoeModel.dense`."""

    weight: str  # [E, D]
    bias: str | None = None  # [E]
    selection_bias: str | None = None  # [E]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model, without its weights."""

    checkpoint: Checkpoint
    model: MoeModel

    @property
    def name(self) -> str:
        return self.checkpoint.folder.resolve().name

    def as_base(self) -> BaseModel:
        """Raises CheckpointError when a file cannot be read."""
        return BaseModel(FolderIdentity.of(self.checkpoint).fingerprint, self.model)

    def gates(self) -> dict[int, GateTensors]:
        """By layer. Empty for a family that keeps a gate of its own."""
        gated = {layer: experts for layer, experts in self.model.experts.items() if experts.gate is not None}
        weights = [name for name in self.model.dense if self._is_gate(name, gated)]
        if len(weights) != len(gated):
            return {}
        return {layer: self._gate(name) for layer, name in zip(sorted(gated), weights, strict=True)}

    def _is_gate(self, name: str, gated: dict[int, ExpertLayer]) -> bool:
        """A family lists its tensors layer by layer, and a gate is the one of a layer that has a row for each slot."""
        sizes = {experts.num_slots for experts in gated.values()}
        shape = self.model.dense[name].shape
        return (
            len(shape) == 2
            and shape[0] in sizes
            and shape[1] == self.model.hidden_size
            and any(word in name for word in _GATE_WORDS)
            and "shared" not in name
            and name.endswith("weight")
        )

    def _gate(self, weight: str) -> GateTensors:
        bias, selection = (weight.removesuffix("weight") + end for end in ("bias", _SELECTION_BIAS))
        block = weight.rsplit(".", 2)[0]
        known = (selection, f"{block}.{_SELECTION_BIAS}")
        return GateTensors(
            weight,
            bias if bias in self.model.dense else None,
            next((name for name in known if name in self.model.dense), None),
        )


def open_model(folder: Path, field: str) -> ModelFolder:
    """Reads configs and headers. Raises InvalidArgument with this field."""
    try:
        checkpoint = open_checkpoint(folder)
        return ModelFolder(checkpoint, describe_model(checkpoint))
    except CheckpointError as error:
        raise InvalidArgument(f"{field}: {error.message}", field=field, reason=error.reason) from error

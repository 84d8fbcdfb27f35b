"""The model as a worker begins with it: described by its predecessor, or by its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expert_worker.config import WorkerConfig
from expert_worker.experts.kept.model_file import read_model
from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity, check_identity
from moesaic.epoch import ExpertAddress
from moesaic.kept_folder import KeptFolder


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model's description; its fingerprint where weights are kept; and the versions that an earlier worker found."""

    checkpoint: Checkpoint
    fingerprint: bytes = b""
    versions: Mapping[ExpertAddress, bytes] = field(default_factory=dict)


def open_model(config: WorkerConfig, kept: KeptFolder | None) -> OpenedModel:
    """Touches the model's folder only where it must: a worker that was told which model it serves, as in a cluster,
    believes what an earlier one of that model and share has left. One that was not reads the folder's headers first.

    Raises CheckpointError.
    """
    if kept is not None and config.identity is not None:
        fingerprint = config.identity.fingerprint
        if (known := read_model(kept, fingerprint, config.experts)) is not None:
            return OpenedModel(known.checkpoint, fingerprint, known.versions)
    checkpoint = open_checkpoint(config.model)
    check_identity(checkpoint, config.identity)
    if kept is None:
        return OpenedModel(checkpoint)
    fingerprint = (config.identity or FolderIdentity.of(checkpoint)).fingerprint
    known = read_model(kept, fingerprint, config.experts)
    return OpenedModel(checkpoint, fingerprint, {} if known is None else known.versions)

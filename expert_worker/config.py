"""The configuration of an expert worker. It imports no torch, so that planning a worker stays light."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoints.identity import FolderIdentity
from moesaic.epoch import ExpertAddress
from moesaic.families.model import DenseLayers
from moesaic.settings import Device, DType, WorkerSettings


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker: its share of the model, its address, its device. Without a name it is called HOSTNAME:PORT."""

    name: str
    model: Path
    experts: frozenset[ExpertAddress]
    host: str
    port: int
    device: Device
    dtype: DType
    settings: WorkerSettings
    dense_layers: DenseLayers = "auto"
    # What the model's folder must be on the worker's host; None where nobody has checked it elsewhere.
    identity: FolderIdentity | None = None

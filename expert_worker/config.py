"""What an expert worker has to be told. Light: whoever plans a worker on another machine loads no torch for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.epoch import ExpertAddress
from moesaic.families.model import DenseLayers
from moesaic.settings import Device, DType, WorkerSettings


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker: its share of the model, its address, its device."""

    name: str
    model: Path
    experts: frozenset[ExpertAddress]
    host: str
    port: int
    device: Device
    dtype: DType
    settings: WorkerSettings
    dense_layers: DenseLayers = "auto"

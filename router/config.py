"""The configuration of a router. Imports no torch, which planning a router elsewhere does not need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families.model import DenseLayers
from moesaic.settings import Device, DType, EngineSettings


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The model, public address, device and bounds of one router."""

    model: Path
    served_name: str
    host: str
    port: int
    device: Device
    dtype: DType
    engine: EngineSettings
    dense_layers: DenseLayers = "auto"
    # By which the controller knows it; empty: by its address.
    name: str = ""
    # What the model's folder must be on the router's host; None where nobody has checked it elsewhere.
    identity: FolderIdentity | None = None

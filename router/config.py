"""What a router has to be told. Light: whoever plans a router on another machine loads no torch for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.families.model import DenseLayers
from moesaic.settings import Device, DType, EngineSettings


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """One router: its model, its public address, its device, its bounds."""

    model: Path
    served_name: str
    host: str
    port: int
    device: Device
    dtype: DType
    engine: EngineSettings
    dense_layers: DenseLayers = "auto"

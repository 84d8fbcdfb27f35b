"""What a gateway has to be told. Light: whoever plans one loads no web framework for it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where the gateway listens, and its bounds."""

    host: str
    port: int
    settings: GatewaySettings

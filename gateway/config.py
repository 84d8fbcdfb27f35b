"""The configuration of a gateway. A process that only plans one imports no web framework for it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The address that the gateway listens on, and its bounds."""

    host: str
    port: int
    settings: GatewaySettings

"""What routers are told: which epochs are in use, and where their versions are."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control.head import Trial
from moesaic.epoch import Epoch
from moesaic.routing_table import RoutingTable
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class Publication:
    """A whole snapshot. `epoch` is None until every one of its versions has been held."""

    epoch: Epoch | None
    table: RoutingTable
    canary: Epoch | None = None
    trial: Trial | None = None
    drain_s: float = 0.0

    def to_proto(self) -> control_pb2.WatchResponse:
        canary = None
        if self.canary is not None and self.trial is not None:
            canary = control_pb2.Canary(
                epoch=self.canary.to_proto(),
                share=self.trial.share,
                shadow_share=self.trial.shadow_share,
            )
        return control_pb2.WatchResponse(
            epoch=self.epoch.to_proto() if self.epoch else None,
            routing_table=self.table.to_proto(),
            canary=canary,
            drain_s=self.drain_s,
        )

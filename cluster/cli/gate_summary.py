"""The health of the gates of all routers, in one line. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moesaic.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class GateSummary:
    """The largest z-loss of any gate, and the assignments of gates whose slots have a capacity."""

    z_loss: float
    layer: int
    assignments: int
    dropped: int

    @property
    def dropped_share(self) -> float | None:
        """None where assignments are not counted."""
        return self.dropped / self.assignments if self.assignments else None

    def __str__(self) -> str:
        line = f"gates: largest z-loss {self.z_loss:.3g} (layer {self.layer})"
        share = self.dropped_share
        return line if share is None else f"{line}; {share:.1%} of assignments dropped"

    def plain(self) -> dict[str, Any]:
        return {"z_loss": self.z_loss, "layer": self.layer, "dropped_share": self.dropped_share}


def summarise_gates(routers: Iterable[inference_pb2.GetRouterStatsResponse]) -> GateSummary | None:
    """None before any router has measured a gate, and for a model without gates."""
    gates = [gate for router in routers for gate in router.gates]
    seen = [gate for gate in gates if gate.HasField("z_loss")]
    if not seen:
        return None
    worst = max(seen, key=lambda gate: gate.z_loss)
    return GateSummary(
        z_loss=worst.z_loss,
        layer=worst.layer,
        assignments=sum(gate.assignments for gate in gates),
        dropped=sum(gate.dropped for gate in gates),
    )

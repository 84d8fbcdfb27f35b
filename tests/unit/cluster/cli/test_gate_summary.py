"""The gates of all routers in one line."""

from __future__ import annotations

from cluster.cli.gate_summary import summarise_gates
from moesaic.v1.inference_pb2 import GateStats, GetRouterStatsResponse


def test_the_worst_gate_of_any_router_is_named_and_what_was_dropped_is_added_up() -> None:
    first = GetRouterStatsResponse(
        gates=[GateStats(layer=1, z_loss=2.0, assignments=100, dropped=1), GateStats(layer=2, z_loss=30.25)]
    )
    second = GetRouterStatsResponse(gates=[GateStats(layer=1, z_loss=4.0, assignments=100, dropped=4)])
    summary = summarise_gates([first, second])
    assert str(summary) == "gates: largest z-loss 30.2 (layer 2); 2.5% of assignments dropped"
    assert summary is not None
    assert summary.plain() == {"z_loss": 30.25, "layer": 2, "dropped_share": 0.025}


def test_where_nothing_can_be_dropped_nothing_is_said_of_it() -> None:
    router = GetRouterStatsResponse(gates=[GateStats(layer=0, z_loss=1.5)])
    assert str(summarise_gates([router])) == "gates: largest z-loss 1.5 (layer 0)"


def test_without_gates_or_before_anybody_looked_there_is_nothing_to_say() -> None:
    assert summarise_gates([]) is None
    assert (
        summarise_gates([GetRouterStatsResponse(), GetRouterStatsResponse(gates=[GateStats(layer=1)])])
        is None
    )

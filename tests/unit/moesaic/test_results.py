"""The answers of the router's other calls as frozen values: nothing of the messages is lost."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from moesaic.client.model_info import ModelInfo
from moesaic.client.router_stats import GateStats, PhaseTime, Refusals, RouterStats, WorkerTraffic
from moesaic.client.tokenization import Tokenization
from moesaic.v1 import inference_pb2 as pb

PAIRS: list[tuple[Any, Any]] = [
    (ModelInfo, pb.GetModelInfoResponse),
    (RouterStats, pb.GetRouterStatsResponse),
    (WorkerTraffic, pb.WorkerTraffic),
    (PhaseTime, pb.PhaseTime),
    (GateStats, pb.GateStats),
    (Tokenization, pb.TokenizeResponse),
]


@pytest.mark.parametrize(("value", "message"), PAIRS)
def test_a_value_has_the_fields_of_its_message(value: Any, message: Any) -> None:
    assert [field.name for field in fields(value)] == [field.name for field in message.DESCRIPTOR.fields]


@pytest.mark.parametrize(("value", "message"), PAIRS)
def test_a_value_is_hashable_and_so_holds_no_message(value: Any, message: Any) -> None:
    hash(value.from_pb(message()))


def test_what_was_not_measured_is_none() -> None:
    assert GateStats.from_pb(pb.GateStats(layer=3)).z_loss is None
    assert GateStats.from_pb(pb.GateStats(layer=3, z_loss=0.0)).z_loss == 0.0


def test_nested_messages_become_values() -> None:
    stats = RouterStats.from_pb(
        pb.GetRouterStatsResponse(
            phases=[pb.PhaseTime(phase="wire", seconds=1.5)],
            workers=[pb.WorkerTraffic(worker="expert-worker-0", rows=3)],
            refusals={"QUEUE_FULL": 2, "DEADLINE_UNREACHABLE": 1},
        )
    )

    assert stats.phases == (PhaseTime("wire", 1.5),)
    assert (stats.workers[0].worker, stats.workers[0].rows) == ("expert-worker-0", 3)
    assert stats.refusals == (Refusals("DEADLINE_UNREACHABLE", 1), Refusals("QUEUE_FULL", 2))

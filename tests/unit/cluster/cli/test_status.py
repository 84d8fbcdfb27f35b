"""What `moesaic status` prints of a cluster, with and without a controller that answers."""

from __future__ import annotations

import json

import pytest
from support.played_cluster import PlayedController, PlayedRouter, playing

from cluster.cli.status import run_status
from moesaic.v1 import control_pb2, inference_pb2


def router() -> PlayedRouter:
    stats = inference_pb2.GetRouterStatsResponse(
        kv_blocks_used=1, kv_blocks_total=4, generated_tokens=1234, uptime_s=12.0
    )
    stats.workers.add(worker="expert-worker-0", address="127.0.0.1:9", connected=True, calls=5, rows=6789)
    stats.workers[0].circuit = "closed"
    return PlayedRouter(stats)


async def test_a_router_without_a_controller_shows_its_own_view(capsys: pytest.CaptureFixture[str]) -> None:
    async with playing(router()) as (address, _):
        await run_status(address, as_json=False)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        f"tiny (mixtral), epoch e1, router {address}",
        "2 layers; context 0; up 12 s",
        "0 running, 0 waiting; KV 1 of 4 blocks; 1,234 tokens generated",
        "",
        "worker           circuit  address      calls   rows  p99 ms  failed  late",
        "─────────────────────────────────────────────────────────────────────────",
        "expert-worker-0  closed   127.0.0.1:9      5  6,789    0.00       0     0",
    ]


async def test_refusals_are_told_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    asked = router()
    asked.stats.refusals.update({"DEADLINE_UNREACHABLE": 7, "QUEUE_FULL": 1200})
    async with playing(asked) as (address, _):
        await run_status(address, as_json=False)
    assert "refused: 1,200 QUEUE_FULL, 7 DEADLINE_UNREACHABLE\n" in capsys.readouterr().out


async def test_json_holds_what_router_and_controller_report(capsys: pytest.CaptureFixture[str]) -> None:
    asked, controller = router(), PlayedController()
    async with playing(controller) as (asked.control_address, _), playing(asked) as (address, _):
        controller.topology.processes.add(
            name="router-0", role=control_pb2.PROCESS_ROLE_ROUTER, address=address
        )
        await run_status(address, as_json=True)
    status = json.loads(capsys.readouterr().out)
    assert list(status) == ["router", "model", "stats", "routers", "topology", "problem"]
    assert (status["router"], status["model"]["model"], status["problem"]) == (address, "tiny", None)
    assert status["routers"] == {"router-0": status["stats"]}
    assert status["topology"]["processes"][0]["name"] == "router-0"


async def test_a_controller_that_does_not_answer_is_a_remark(
    capsys: pytest.CaptureFixture[str], closed_address: str
) -> None:
    asked = router()
    asked.control_address = closed_address
    async with playing(asked) as (address, _):
        await run_status(address, as_json=True)
    status = json.loads(capsys.readouterr().out)
    assert (status["topology"], list(status["routers"])) == (None, ["router"])
    assert status["problem"] == (
        f"the controller at {closed_address} does not answer, and serving goes on: only the router's view is shown"
    )


async def test_experts_that_no_worker_holds_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    asked = router()
    asked.stats.experts = 32
    async with playing(asked) as (address, _):
        await run_status(address, as_json=False)
        assert "have no worker" not in capsys.readouterr().out
        asked.stats.experts_without_worker = 16
        await run_status(address, as_json=False)
        assert "16 of 32 experts have no worker" in capsys.readouterr().out


async def test_sequences_that_wait_for_a_missing_expert_are_told_where_there_are_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = router()
    async with playing(asked) as (address, _):
        await run_status(address, as_json=False)
        assert "missing" not in capsys.readouterr().out
        asked.stats.parked_sequences = 1
        await run_status(address, as_json=False)
        assert "1 sequence waits for a missing expert at router" in capsys.readouterr().out


async def test_why_a_replica_is_not_called_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = router()
    asked.stats.workers[0].circuit = "quarantined"
    asked.stats.workers[0].last_error = "the worker's answer is not finite"
    async with playing(asked) as (address, _):
        await run_status(address, as_json=False)
    printed = capsys.readouterr().out
    assert "expert-worker-0 is quarantined at router: the worker's answer is not finite" in printed

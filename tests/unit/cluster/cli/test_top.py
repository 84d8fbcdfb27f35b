"""What `moesaic top` shows, and what it says when nobody answers."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console, RenderableType
from typer.testing import CliRunner

from cluster.cli.commands import app
from cluster.cli.top import TopView
from cluster.cli.top_view import Look, draw_look, plain_look
from cluster.observation.activity import activity_between
from cluster.observation.observer import Observation, ObservedProcess
from moesaic.v1 import control_pb2, expert_pb2, inference_pb2

TARGET = "127.0.0.1:50051"


def drawn(view: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def observation(second: int) -> Observation:
    """A router with a busy worker, one that loads and one that does not answer."""
    traffic = inference_pb2.WorkerTraffic(
        worker="expert-worker-0",
        address="127.0.0.1:1",
        failed_calls=second,
        transport="grpc",
        call_p50_us=12_345,
        call_p99_us=123_456,
    )
    router = inference_pb2.GetRouterStatsResponse(
        generated_tokens=1234 * second,
        prompt_tokens=12_345 * second,
        steps=100 * second,
        running_sequences=64,
        waiting_sequences=256,
        kv_blocks_used=1,
        kv_blocks_total=4,
        prefix_lookup_tokens=100 * second,
        prefix_hit_tokens=43 * second,
        uptime_s=100.0 + second,
        workers=[traffic],
        gates=[inference_pb2.GateStats(layer=1), inference_pb2.GateStats(layer=3, z_loss=9.5)],
    )
    busy = expert_pb2.GetWorkerStatsResponse(
        calls=1000 * second, rows=123_456 * second, busy_s=0.5 * second, uptime_s=100.0 + second
    )
    ready, loading = control_pb2.PROCESS_STATE_READY, control_pb2.PROCESS_STATE_LOADING
    return Observation(
        at_s=float(second),
        model=inference_pb2.GetModelInfoResponse(model="demo_model", epoch="0123456789abcdef"),
        processes=(
            ObservedProcess("router-0", TARGET, True, ready),
            ObservedProcess("expert-worker-0", "127.0.0.1:1", False, ready),
            ObservedProcess("expert-worker-1", "127.0.0.1:2", False, loading, "reads its experts"),
            ObservedProcess("expert-worker-2", "127.0.0.1:3", False, ready),
        ),
        routers={"router-0": router},
        workers={"expert-worker-0": busy, "expert-worker-1": expert_pb2.GetWorkerStatsResponse()},
    )


def look() -> Look:
    before, after = observation(1), observation(2)
    return Look(TARGET, after, activity_between(before, after))


def test_a_cluster_without_workers_has_no_table_of_them() -> None:
    alone = replace(observation(2), processes=observation(2).processes[:1])
    text = drawn(draw_look(Look(TARGET, alone, activity_between(alone, alone))))
    assert "router-0" in text
    assert "worker" not in text


def line(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def test_the_view_fits_eighty_columns_and_says_what_everybody_does() -> None:
    text = drawn(draw_look(look()))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "1,234 tokens a second out, 12,345 in; 64 running, 256 waiting" in text
    assert "gates: largest z-loss 9.5 (layer 3)" in text
    assert line(text, "router-0") == [
        "router-0",
        "ready",
        "1,234",
        "12,345",
        "100",
        "64",
        "256",
        "25%",
        "43%",
    ]
    assert line(text, "expert-worker-0") == (
        ["expert-worker-0", "ready", "grpc", "123,456", "1,000", "50%", "12.35", "123.46", "2"]
    )


def test_a_narrow_terminal_shows_fewer_columns_and_whole_names() -> None:
    text = drawn(draw_look(look()), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text
    assert line(text, "expert-worker-0") == ["expert-worker-0", "ready", "123,456", "50%", "123.46", "2"]
    assert line(text, "router-0") == ["router-0", "ready", "1,234", "12,345", "64", "256", "25%"]


def test_the_longest_name_of_a_transport_fits_eighty_columns_as_well() -> None:
    seen = look()
    workers = tuple(replace(worker, transports=("shared_memory",)) for worker in seen.activity.workers)
    text = drawn(draw_look(replace(seen, activity=replace(seen.activity, workers=workers))))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert line(text, "expert-worker-0")[2] == "shared"


def test_a_worker_that_loads_and_one_that_is_away_are_told_from_one_that_serves() -> None:
    text = drawn(draw_look(look()))
    assert line(text, "expert-worker-1")[1] == "loading"
    assert line(text, "expert-worker-2")[1] == "away"
    assert "expert-worker-1: reads its experts" in text


def test_sequences_that_wait_for_a_missing_expert_are_told_where_there_are_some() -> None:
    assert "missing" not in drawn(draw_look(look()))
    some = look()
    some.observation.routers["router-0"].parked_sequences = 3
    assert "3 sequences wait for a missing expert at router-0" in drawn(draw_look(some))
    activity = activity_between(some.observation, some.observation)
    assert plain_look(replace(some, activity=activity))["routers"][0]["parked_sequences"] == 3


def test_json_holds_the_same() -> None:
    plain = json.loads(json.dumps(plain_look(look())))
    assert plain["generated_tokens_per_s"] == 1234.0
    assert plain["routers"][0]["prefix_hit_share"] == 0.43
    busy, loading, away = plain["workers"]
    assert (busy["rows_per_s"], busy["busy_share"], busy["call_p99_us"]) == (123_456.0, 0.5, 123_456)
    assert (busy["transports"], busy["failed_calls"]) == (["grpc"], 2)
    assert (loading["state"], loading["call_p50_us"], away["state"]) == ("loading", None, "away")
    assert plain["gates"] == {"z_loss": 9.5, "layer": 3, "dropped_share": None}


def test_the_first_look_has_no_rates_yet_and_the_second_has() -> None:
    view = TopView(TARGET)
    view.see(observation(1))
    assert "0 tokens a second out" in drawn(view.drawn())
    view.see(observation(2))
    assert "1,234 tokens a second out" in drawn(view.drawn())


def test_a_server_that_goes_away_is_said_to_be_away_since_when_and_the_last_look_stays() -> None:
    now_s = 10.0
    view = TopView(TARGET, clock=lambda: now_s)
    view.see(observation(1))
    view.see(observation(2))
    view.miss("no router answers")
    now_s = 14.0
    view.miss("no router answers")
    text = drawn(view.drawn())
    assert "no router answers 4 s so far, trying again" in text
    assert "expert-worker-0" in text


def test_a_server_that_comes_back_is_counted_anew() -> None:
    view = TopView(TARGET)
    view.see(observation(1))
    view.miss("no router answers")
    view.see(observation(9))
    text = drawn(view.drawn())
    assert "trying again" not in text
    assert "0 tokens a second out" in text


def test_before_the_first_look_there_is_only_what_is_wrong() -> None:
    view = TopView(TARGET, clock=lambda: 1.0)
    view.miss("no router answers")
    assert drawn(view.drawn()) == "no router answers 0 s so far, trying again\n"


def test_without_a_terminal_a_server_that_is_away_is_an_error(closed_address: str) -> None:
    result = CliRunner().invoke(app, ["top", "--grpc", closed_address])
    assert result.exit_code == 1
    assert result.stderr == f"error: no router answers at {closed_address}: is `moesaic serve` running?\n"

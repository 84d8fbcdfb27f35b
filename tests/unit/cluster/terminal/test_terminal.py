"""What people see: nothing wider than their terminal, and JSON with the values as they are."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli.demo import DemoReport, StreamedAnswer, WorkerShare, _print_closing
from cluster.cli.status import _print
from cluster.launch.milestones import Milestones, seconds_since_start
from cluster.observation.observer import Observation
from cluster.terminal.json_output import plain
from cluster.terminal.load_progress import LoadProgress
from cluster.terminal.tables import bar, count, new_table, size
from cluster.terminal.word_flow import WordFlow
from moesaic.v1 import control_pb2 as pb
from moesaic.v1 import inference_pb2

TARGET = "127.0.0.1:50051"
TOPOLOGY = pb.GetTopologyResponse(
    model="tiny",
    epoch="0123456789abcdef",
    revision=1 << 32,
    processes=[
        pb.Process(
            name="controller",
            role=pb.PROCESS_ROLE_CONTROLLER,
            state=pb.PROCESS_STATE_READY,
            address="192.168.100.100:65535",
            pid=4194304,
        ),
        pb.Process(
            name="expert-worker-63",
            role=pb.PROCESS_ROLE_EXPERT_WORKER,
            state=pb.PROCESS_STATE_PENDING,
            restarts=2,
            detail="its connection broke",
            loaded_bytes=1 << 30,
        ),
    ],
)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def status(num_routers: int = 1, num_experts: int = 8) -> Observation:
    stats = inference_pb2.GetRouterStatsResponse(
        workers=[inference_pb2.WorkerTraffic(worker="expert-worker-63", rows=1234567)],
        running_sequences=1024,
        waiting_sequences=256,
        kv_blocks_used=123456,
        kv_blocks_total=1234567,
        generated_tokens=1 << 40,
    )
    model = inference_pb2.GetModelInfoResponse(
        model="tiny",
        epoch="0123456789abcdef",
        family="mixtral",
        num_layers=32,
        num_experts=num_experts,
        num_experts_per_token=min(2, num_experts),
    )
    routers = {f"router-{index}": stats for index in range(num_routers)}
    return Observation(
        at_s=0.0, model=model, processes=(), routers=routers, workers={}, entry=stats, topology=TOPOLOGY
    )


def test_the_status_fits_eighty_columns_and_says_why_a_process_is_away() -> None:
    console = terminal()
    _print(TARGET, status(), console)
    text = written(console)
    assert max(map(len, text.splitlines())) <= 80
    assert "1,234,567" in text
    assert "expert-worker-63: its connection broke" in text


@pytest.mark.parametrize(
    ("num_experts", "says"),
    [
        (0, "32 layers; context"),
        (1, "32 layers of 1 expert, 1 a token; context"),
        (8, "32 layers of 8 experts, 2 a token; context"),
    ],
)
def test_the_status_says_how_many_experts_a_layer_has(num_experts: int, says: str) -> None:
    console = terminal()
    _print(TARGET, status(num_experts=num_experts), console)
    assert says in written(console)


def test_the_status_of_a_router_without_workers_or_controller_has_no_table() -> None:
    console = terminal()
    alone = replace(status(num_experts=0), topology=None, entry=inference_pb2.GetRouterStatsResponse())
    _print(TARGET, alone, console)
    assert "worker" not in written(console)


def test_the_status_of_several_routers_adds_up_what_they_sent_and_fits_eighty_columns() -> None:
    console = terminal()
    _print(TARGET, status(num_routers=3), console)
    text = written(console)
    assert max(map(len, text.splitlines())) <= 80
    assert "3,703,701" in text
    assert text.count("123456 of 1234567") == 3


def test_the_demo_fits_eighty_columns() -> None:
    worker = WorkerShare("expert-worker-0", 8, 123456, 12345, 12.345, 1 << 30)
    report = DemoReport(
        "", StreamedAnswer("", 120, 78.0), (worker,), {"worker compute": 1.5}, {"first token": 9.9}
    )
    console = terminal()
    _print_closing(console, report)
    assert max(map(len, written(console).splitlines())) <= 80


def test_streamed_text_breaks_between_words() -> None:
    console = Console(file=io.StringIO(), width=10)
    flow = WordFlow(console)
    for piece in ("one tw", "o three", " ", "a-word-longer-than-a-line", "\nend"):
        flow.write(piece)
    flow.end()
    assert written(console) == "one two \nthree \na-word-longer-than-a-line\nend\n"


def test_without_a_terminal_each_change_of_state_is_one_plain_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    with LoadProgress(console) as progress:
        progress.show(TOPOLOGY)
        progress.show(TOPOLOGY)
    assert written(console) == "controller: ready\nexpert-worker-63: its connection broke\n"


def test_what_a_process_waits_for_is_said_as_soon_as_it_is_known_on_a_terminal_as_well() -> None:
    waiting = pb.Process(name="expert-worker-0", state=pb.PROCESS_STATE_PENDING)
    console = terminal()
    with LoadProgress(console) as progress:
        progress.show(pb.GetTopologyResponse(processes=[waiting]))
        waiting.detail = "it waits for Ray to start it, CPUs free: 0 of 4 on 10.0.0.1, 0 of 4 on 10.0.0.2, 0 of 4 on 10.0.0.3"
        for _ in range(2):
            progress.show(pb.GetTopologyResponse(processes=[waiting]))
    assert written(console).count(f"expert-worker-0: {waiting.detail}\n") == 1


def test_why_a_process_failed_stands_behind_its_state() -> None:
    failed = pb.Process(name="expert-worker-0", state=pb.PROCESS_STATE_FAILED, detail="no memory")
    console = terminal()
    with LoadProgress(console) as progress:
        progress.show(pb.GetTopologyResponse(processes=[failed]))
    assert "expert-worker-0: failed: no memory\n" in written(console)


def test_a_start_says_at_once_that_ray_starts_and_a_signal_is_answered_beside_it() -> None:
    console = Console(file=io.StringIO(), width=60)
    with LoadProgress(console) as progress:
        progress.start_ray()
        progress.announce("stopping")
        progress.end_ray()
        progress.show(TOPOLOGY)
    assert written(console).startswith("Ray: starting\nstopping\ncontroller: ready\n")


def test_milestones_count_the_first_time_only() -> None:
    times = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    milestones = Milestones(lambda: next(times))
    milestones.reach("Ray runs")
    milestones.look(pb.GetTopologyResponse())
    milestones.look(TOPOLOGY)
    everything_up = pb.GetTopologyResponse()
    everything_up.CopyFrom(TOPOLOGY)
    everything_up.processes[1].state, everything_up.processes[1].pid = pb.PROCESS_STATE_READY, 7
    milestones.look(everything_up)
    assert list(milestones.reached_s) == [
        "Ray runs",
        "controller answers",
        "all processes run",
        "experts loaded",
    ]
    assert milestones.reached_s["controller answers"] == 2.0


def test_this_process_has_an_age() -> None:
    assert 0 < seconds_since_start() < 24 * 3600


def test_numbers_are_short() -> None:
    assert (count(12345), size(512), size(3 << 20), size(5 << 40)) == (
        "12,345",
        "512 B",
        "3.0 MiB",
        "5.0 TiB",
    )
    assert (bar(0), len(bar(0.5))) == ("", 10)


def test_a_message_is_plain_json_with_its_numbers_and_without_prefixes() -> None:
    topology = plain(TOPOLOGY)
    assert topology["revision"] == 1 << 32
    worker = topology["processes"][1]
    assert (worker["state"], worker["role"], worker["experts"]) == ("pending", "expert_worker", [])


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_none(width: int) -> None:
    console = terminal(width)
    _print(TARGET, status(num_routers=3), console)
    worker = WorkerShare("expert-worker-63", 8, 123456, 12345, 12.345, 1 << 30)
    _print_closing(
        console, DemoReport("", StreamedAnswer("", 120, 78.0), (worker,), {"wire": 1.5}, {"first token": 9.9})
    )
    text = written(console)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("expert-worker-63 ") == 3
    assert "192.168.100.100:65535" in text


def test_columns_are_left_out_in_the_order_of_their_importance() -> None:
    def headers(width: int) -> list[str]:
        console = terminal(width)
        table = new_table("name", "address", ">calls", ">rows", drop=("calls", "rows"))
        table.add_row("worker-0", "127.0.0.1:50051", "1", "2")
        console.print(table)
        return written(console).splitlines()[0].split()

    assert headers(80) == ["name", "address", "calls", "rows"]
    assert headers(38) == ["name", "address", "calls", "rows"]
    assert headers(37) == ["name", "address", "rows"]
    assert headers(30) == ["name", "address"]


def test_the_status_tells_the_id_of_every_process_that_runs() -> None:
    console = terminal(120)
    _print(TARGET, status(), console)
    assert "4194304" in written(console)

"""`moesaic bench`: what it refuses, and how it shows what it found."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.bench import bench
from cluster.bench.chart import GROUPS, draw_chart, group_share
from cluster.bench.latency import LoadSummary, Percentiles, WaveSummary
from cluster.bench.machine import Machine
from cluster.bench.report import BenchReport, Duel, Level, Row, print_report
from cluster.cli import main as cli
from cluster.cli.commands import app
from cluster.observation.step_profile import StepProfile, WorkerProfile
from router.phase_clock import Phase


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("bad input must be told before anything runs")

    for name in ("running_cluster", "share_used_by_others", "ask_model_name"):
        monkeypatch.setattr(bench, name, start)


def row(level: Level, *, failed: int = 0, factor: float = 1.0) -> Row:
    load = LoadSummary(
        requests=128,
        failed_requests=failed,
        errors={"HTTP 429: the queue is full": failed} if failed else {},
        seconds=10.0,
        prompt_tokens=81_920,
        output_tokens=12_345,
        output_tokens_per_s=1_234.5 * factor,
        total_tokens_per_s=12_345.6 * factor,
        requests_per_s=123.45,
        ttft=Percentiles(12_345.6, 23_456.7),
        inter_token=Percentiles(12.3, 1_234.5),
    )
    profile = StepProfile(
        steps=12_345,
        overlapped_steps=12,
        tokens_per_step=123.4,
        phases_ms=dict.fromkeys(Phase, 123.45 * factor),
        step_ms=123.45 * len(Phase) * factor,
        outside_steps_share=0.05,
        bytes_per_token=12_345_678.0,
        calls_per_output_token=32.0,
        prefix_hit_share=0.5,
        preemptions=3,
        workers=(WorkerProfile("expert-worker-0", 0.5, 1234, 567, 1, ("shared_memory",), 1234, 12_345),),
    )
    return Row(level, load, profile, client_cores=0.6)


def report(*rows: Row, duels: tuple[Duel, ...] = ()) -> BenchReport:
    return BenchReport(
        model="demo_model",
        epoch="0123456789abcdef",
        url="http://127.0.0.1:8000",
        prompt_len="128",
        output_len="64",
        shared_prefix=32,
        seed=0,
        machine=Machine("AMD EPYC", 2, 24 << 30, "3.11.7", {"torch": "2.13.0"}),
        used_by_others=0.01,
        rows=rows,
        duels=duels,
    )


def duel(streams: int, *pairs: tuple[float, float], failed: int = 0) -> Duel:
    """Pairs of decode rates, ours and theirs."""
    ours, theirs = (
        tuple(WaveSummary(0.1, rate, rate / 2) for rate in side) for side in zip(*pairs, strict=True)
    )
    return Duel(streams, ours, theirs, "eager / grouped_mm", streams * len(pairs), streams, failed)


def printed(found: BenchReport) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    print_report(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_fits_eighty_columns_and_cuts_nothing() -> None:
    rows = [row(Level(streams)) for streams in (1, 4, 16, 64)]
    text = printed(report(*rows, duels=(duel(64, (1_234.5, 1_000.0)),)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_levels_that_do_not_fit_beside_each_other_follow_below() -> None:
    text = printed(report(*(row(Level(streams)) for streams in range(1, 6))))
    assert text.count("where a step goes") == 2


def test_errors_are_shown_with_what_they_were() -> None:
    text = printed(report(row(Level(16), failed=7)))
    assert "16: 7 x HTTP 429: the queue is full" in text


def test_what_makes_a_figure_doubtful_is_said() -> None:
    text = printed(report(row(Level(16))))
    assert "16: 3 sequences were put back: the KV cache was full" in text
    assert "16: the load generator took 0.6 cores: it may be what was measured" in text
    assert "16: 1 calls to workers failed" in text


def test_ratios_are_medians_pair_by_pair() -> None:
    text = printed(report(duels=(duel(4, (10.0, 10.0), (30.0, 10.0), (20.0, 5.0), failed=1),)))
    line = next(line for line in text.splitlines() if line.startswith("decode"))
    assert line.split()[-5:] == ["20.0", "10.0", "3.00", "1.00", "4.00"]
    assert "3 pairs, 1 pairs failed; the same tokens in 4 of 12 sequences" in text


def test_a_comparison_whose_pairs_all_failed_has_no_ratio() -> None:
    text = printed(report(duels=(Duel(4, (), (), "", 0, 0, 5),)))
    assert "0 pairs, 5 pairs failed" in text


def test_the_chart_counts_every_phase_of_a_step_once() -> None:
    assert sorted(phase for group in GROUPS for phase in group.phases) == sorted(Phase)
    measured = row(Level(1))
    assert sum(group_share(measured, group) for group in GROUPS) == pytest.approx(1.0)


def test_the_ticks_of_the_latencies_are_plain_numbers(tmp_path: Path) -> None:
    file = tmp_path / "chart.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_chart(report(row(Level(1)), row(Level(64), factor=3.0)), file)
    text = file.read_text()
    assert ">10,000<" in text and "10^" not in text and "times" not in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_chart_is_drawn_for_any_load(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"chart.{ending}"
    rows = (row(Level(1)), row(Level(64), factor=3.0), row(Level(0, 2.5)))
    draw_chart(report(*rows, duels=(duel(64, (1_234.5, 1_000.0)),)), file)
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--concurrency", "0"), "concurrency"),
        (("--rate", "-2"), "rate"),
        (("--prompt-len", "x"), "prompt_len"),
        (("--output-len", "8-4"), "output_len"),
        (("--prompt-len", "2000", "--output-len", "100"), "prompt_len"),
        (("--shared-prefix", "129"), "shared_prefix"),
        (("--against", "something"), "against"),
        (("--against", "transformers", "--rate", "2"), "against"),
        (("--against", "transformers", "--prompt-len", "8-16"), "prompt_len"),
        (("--against", "transformers", "--output-len", "8-16"), "output_len"),
        (("--against", "transformers", "--url", "http://127.0.0.1:1"), "against"),
        (("--url", "127.0.0.1:8000"), "url"),
        (("--url", "http://127.0.0.1:8000", "--workers", "2"), "url"),
        (("--grpc", "127.0.0.1:50051"), "grpc"),
        (("--chart", "chart.txt"), "chart"),
        (("--chart", "/no/such/folder/chart.png"), "chart"),
        (("--save", "/no/such/folder/found.json"), "save"),
        (("--workers", "33"), "workers"),
        (("/no/such/model",), "model"),
    ],
)
def test_bad_input_is_one_line_that_names_its_flag(arguments: tuple[str, ...], field: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    name = "model" if field == "model" else f"--{field.replace('_', '-')}"
    assert result.stderr.startswith((f"error: {name} ", f"error: {name}: "))
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


def test_a_chart_without_its_library_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["moesaic", "bench", "--chart", str(tmp_path / "chart.png")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    wanted = "error: the command needs matplotlib; from a checkout: pip install ./moesaic '.[bench]'\n"
    assert capsys.readouterr().err == wanted

"""What the benchmarks share: turns, verdicts, results on disk, and the report that is written into the documentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from goodput import make_requests
from harness import options
from harness import turns as turns_module
from harness.floors import expert_parameters, router_parameters
from harness.likeness import compare_scores
from harness.load import Stream, quantile, random_prompts
from harness.phases import Phases
from harness.result import Figure, Result, Table
from harness.serving import Setup
from harness.speed_summary import MIXTRAL_8X7B, held_bytes, step_bytes
from harness.targets import BY_KEY, TARGETS
from harness.turns import Rules, Side, Turns, ratio, take_turns
from random_checkpoint import Shape
from report import DOCUMENT, render
from stall import gaps_ending_within

from cluster.bench.other_load import Watched

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 24.0,
    "features": "avx2",
    "python": "3.11.0",
    "system": "Linux 6",
    "versions": {"torch": "2.13"},
}


def result(*figures: Figure, name: str = "decode") -> Result:
    table = Table("Speeds", ("batch", "ours"), (("1", "20.0"),))
    return Result(
        name, figures, (table,), ("a note",), {"points": [1]}, False, "python x.py", "today", MACHINE
    )


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """What the next measurements will have been disturbed by, first come first."""
    coming: list[Watched] = []

    def watched(measure, idle_pids):  # type: ignore[no-untyped-def]
        return measure(), coming.pop(0) if coming else Watched(1.0, 0.0, 0.0)

    monkeypatch.setattr(turns_module, "watch", watched)
    monkeypatch.setattr(turns_module, "wait_until_quiet", lambda timeout_s: True)
    return coming


def sides(log: list[str]) -> tuple[Side[float], Side[float]]:
    def measure(name: str) -> float:
        log.append(name)
        return float(len(log))

    return Side("a", lambda: measure("a")), Side("b", lambda: measure("b"))


def test_sides_take_turns_in_opposite_order(cpu: list[Watched]) -> None:
    log: list[str] = []
    taken = take_turns(sides(log), Rules(rounds=3))
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert taken.values("a", float) == [1.0, 4.0, 5.0]
    assert taken.disturbed == (False, False, False)


def test_a_round_that_was_not_quiet_is_taken_again(cpu: list[Watched]) -> None:
    cpu.append(Watched(1.0, others_cores=0.5, idle_cores=0.0))
    log: list[str] = []
    taken = take_turns(sides(log), Rules(rounds=1))
    assert log == ["a", "b", "a", "b"]
    assert taken.disturbed == (False,)


def test_a_busy_machine_costs_no_more_repetitions_than_allowed_and_is_marked(cpu: list[Watched]) -> None:
    cpu += [Watched(1.0, others_cores=0.0, idle_cores=0.5)] * 20
    log: list[str] = []
    taken = take_turns(sides(log), Rules(rounds=2, retries=1))
    assert len(log) == 6
    assert taken.disturbed == (True, True)
    assert taken.others_cores == (0.5, 0.5)


def test_a_ratio_is_that_of_medians_with_the_range_of_pairs() -> None:
    taken = Turns(
        ({"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 2.0}, {"a": 9.0, "b": 3.0}), (0.0,) * 3, (False,) * 3
    )
    found = taken.ratio("a", "b", float)
    assert (found.value, found.low, found.high) == (1.5, 1.5, 3.0)
    assert ratio([4.0], [2.0]).value == 2.0


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("decode-fp32-b1", 1.3, "excellent"),
        ("decode-fp32-b1", 1.0, "met"),
        ("decode-fp32-b1", 0.9, "missed"),
        ("overhead-grpc", 0.4, "excellent"),
        ("overhead-grpc", 0.9, "met"),
        ("overhead-grpc", 1.1, "missed"),
        ("kv-leak", 0.0, "excellent"),
        ("kv-leak", 1.0, "missed"),
    ],
)
def test_a_verdict_follows_from_the_bounds(key: str, value: float, verdict: str) -> None:
    assert BY_KEY[key].verdict(value) == verdict
    assert Figure(key, "", value, "x").verdict == verdict


def test_every_excellent_bound_is_at_least_as_hard_as_its_must() -> None:
    assert all(target.verdict(target.excellent) == "excellent" for target in TARGETS)
    assert len(BY_KEY) == len(TARGETS)


def test_a_result_on_disk_is_read_as_it_was(tmp_path: Path) -> None:
    written = result(Figure("decode-fp32-b1", "decode", 1.25, "x", 1.1, 1.3, 1))
    assert Result.load(written.save(tmp_path)) == written


def test_the_report_fills_blocks_and_leaves_prose() -> None:
    text = "before\n<!-- bench:decode -->\nold\n<!-- /bench:decode -->\nafter\n"
    rendered = render(text, {"decode": result(Figure("", "decode, batch 1", 1.25, "x"))})
    assert rendered.startswith("before\n<!-- bench:decode -->\nSpeeds")
    assert rendered.endswith("<!-- /bench:decode -->\nafter\n")
    assert "decode, batch 1: 1.25" in rendered and "old" not in rendered
    assert render(rendered, {"decode": result(Figure("", "decode, batch 1", 1.25, "x"))}) == rendered


def test_a_figure_stands_in_one_place_of_the_report() -> None:
    text = "<!-- bench:judged -->\n<!-- /bench:judged -->\n<!-- bench:decode -->\n<!-- /bench:decode -->"
    judged = Figure("decode-fp32-b1", "over transformers", 1.25, "x", 1.1, 1.3)
    tabled = Figure("", "over the other", 0.75, "x", 0.7, 0.8)
    listed = Figure("", "over a third", 0.5, "x", 0.4, 0.6)
    found = replace(
        result(judged, tabled, listed),
        tables=(Table("", ("side", "ratio"), (("other", tabled.text), ("fourth", "0.50"))),),
    )
    rendered = render(text, {"decode": found})
    assert [rendered.count(figure.text) for figure in (judged, tabled, listed)] == [1, 1, 1]
    assert "- over a third: 0.50 (0.40 to 0.60)" in rendered


def test_the_speed_block_says_what_the_rates_mean_for_another_model() -> None:
    shape = Shape()
    decode = replace(
        result(),
        tables=(Table("", ("batch", "same tokens"), (("2", "fp32 100%, int8 40%"),)),),
        data={
            "shape": shape.config,
            "points": [
                {"experts": "fp32", "rows": 2, "step_s": 0.04},
                {"experts": "int8", "rows": 2, "step_s": 0.02},
                {"experts": "fp32", "rows": 1, "step_s": 0.025},
            ],
        },
    )
    decode = replace(
        decode, tables=(Table("", ("batch", "same tokens"), (*decode.tables[0].rows, ("1", "fp32 100%"))),)
    )
    rendered = render("<!-- bench:speed -->\n<!-- /bench:speed -->", {"decode": decode})
    assert "| fp32 | 2 | **50** | 25 |" in rendered
    assert "| int8 | 2 | **100** | 50 |" in rendered and "| 40% |" in rendered
    # Two of eight experts of eight layers, and the router's weights, once.
    read = 8 * 2 * expert_parameters(shape) * 4 + router_parameters(shape) * 4
    assert step_bytes(shape, 1, "fp32") == read
    # Mixtral 8x7B has 46.7 billion parameters, of which a token uses 12.9, embeddings included.
    assert held_bytes(MIXTRAL_8X7B, "fp32") / 4 == pytest.approx(46.7e9, rel=0.002)
    assert step_bytes(MIXTRAL_8X7B, 1, "fp32") / 4 == pytest.approx(12.75e9, rel=0.002)
    assert f"| {read / 0.025 / step_bytes(MIXTRAL_8X7B, 1, 'fp32'):.1f} |" in rendered


def test_the_documentation_is_what_the_report_writes_of_the_stored_results() -> None:
    found = {file.stem: Result.load(file) for file in sorted(options.RESULTS.glob("*.json"))}
    text = DOCUMENT.read_text()
    assert render(text, found) == text


def test_a_block_without_a_result_keeps_what_it_says() -> None:
    text = "<!-- bench:shared memory -->\nold\n<!-- /bench:shared memory -->"
    assert render(text, {"decode": result()}) == text


def test_the_judged_table_names_losses_and_what_nobody_measured() -> None:
    text = "<!-- bench:judged -->\n<!-- /bench:judged -->"
    rendered = render(text, {"decode": result(Figure("decode-fp32-b1", "", 0.5, "x", disturbed=2))})
    assert "| 0.50 † | ≥ 0.95 | ≥ 1.2 | **missed** |" in rendered
    assert rendered.count("not measured") == len(TARGETS) - 1


def test_the_machine_is_told_once() -> None:
    rendered = render("<!-- bench:machine -->\n<!-- /bench:machine -->", {"a": result(), "b": result()})
    assert rendered.count("a CPU") == 1


def test_settings_become_the_environment_of_every_process() -> None:
    variables = Setup(
        Path("model"), settings={"engine.shared_memory": "off"}, environment={"OTHER": "1"}
    ).variables
    assert variables["MOESAIC_ENGINE__SHARED_MEMORY"] == "off"
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert variables["OTHER"] == "1"


def test_an_overhead_is_the_wait_without_the_computing() -> None:
    seconds = {"attention": 2.0, "wire": 1.0, "worker queue": 0.5, "worker compute": 4.0, "encode": 0.25}
    phases = Phases(seconds, steps=10, sent_bytes=60, received_bytes=40, calls=80, tokens=20)
    assert phases.overhead_s == pytest.approx(0.15)
    assert phases.compute_s == pytest.approx(0.4)
    assert phases.router_s == pytest.approx(0.225)
    assert phases.step_s == pytest.approx(phases.overhead_s + phases.compute_s + phases.router_s)
    assert phases.bytes_per_token == 5


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_quantile_is_one_of_the_values(share: float, value: int) -> None:
    assert quantile(range(1, 101), share) == value


def test_a_gap_belongs_to_the_window_in_which_it_ends() -> None:
    stream = Stream(token_times_s=[0.0, 1.0, 3.0, 6.0])
    assert gaps_ending_within([stream], 1.0, 3.0) == [1.0, 2.0]


def test_prompts_are_those_of_their_seed() -> None:
    assert random_prompts(2, 8, 100, seed=1) == random_prompts(2, 8, 100, seed=1)
    assert random_prompts(2, 8, 100, seed=1) != random_prompts(2, 8, 100, seed=2)


def test_requests_of_the_goodput_are_within_their_bounds_and_the_same_every_time() -> None:
    requests = make_requests(64, 32_000)
    assert requests == make_requests(64, 32_000)
    assert all(
        32 <= len(request.prompt) <= 512 and 16 <= request.output_tokens <= 128 for request in requests
    )


def test_equal_scores_are_alike() -> None:
    alike = compare_scores([-1.0, -2.0], [-1.0, -2.0])
    assert (alike.mean_error, alike.largest_error, alike.perplexity_ratio) == (0.0, 0.0, 1.0)
    assert compare_scores([-1.0], [-2.0]).perplexity_ratio == pytest.approx(2.718, rel=1e-3)


def test_the_standard_model_has_the_parameters_it_is_known_for() -> None:
    shape = Shape()
    experts = shape.layers * shape.experts * expert_parameters(shape)
    assert expert_parameters(shape) == 11_010_048
    assert experts + router_parameters(shape) + shape.vocabulary * shape.hidden == pytest.approx(
        791e6, rel=0.001
    )

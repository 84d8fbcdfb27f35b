"""Figures from what clients saw."""

from __future__ import annotations

import pytest

from cluster.bench.latency import (
    LoadSummary,
    Percentiles,
    RequestRecord,
    WaveSummary,
    decode_rate,
    percentile,
    rate_between,
)


def record(*times_s: float, due_s: float = 0.0, error: str = "", prompt_tokens: int = 10) -> RequestRecord:
    end_s = times_s[-1] if times_s else due_s + 1.0
    return RequestRecord(due_s, end_s, prompt_tokens, times_s, error=error)


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([float(value) for value in range(101)], 0.99) == 99.0


def test_without_a_value_there_is_no_percentile() -> None:
    assert Percentiles.of([]) == Percentiles(None, None)


def test_throughput_is_of_the_whole_run() -> None:
    summary = LoadSummary.of([record(1.0, 2.0, 3.0), record(4.0, 5.0, due_s=3.0)])
    assert (summary.seconds, summary.output_tokens, summary.prompt_tokens) == (5.0, 5, 20)
    assert summary.output_tokens_per_s == 1.0
    assert summary.total_tokens_per_s == 5.0
    assert summary.requests_per_s == pytest.approx(0.4)


def test_the_first_token_counts_from_when_its_request_was_due() -> None:
    assert LoadSummary.of([record(2.0, 3.0, due_s=0.5)]).ttft.p50_ms == 1500.0


def test_tokens_that_come_together_have_no_time_between_them() -> None:
    inter_token = LoadSummary.of([record(1.0, 2.0, 2.0, 2.0, 3.0)]).inter_token
    assert (inter_token.p50_ms, inter_token.p99_ms) == (500.0, 1000.0)


def test_failed_requests_are_counted_by_what_they_said_and_give_no_latency() -> None:
    summary = LoadSummary.of(
        [record(1.0, 2.0), record(9.0, 90.0, error="HTTP 503: away"), record(error="HTTP 503: away")]
    )
    assert (summary.requests, summary.failed_requests) == (3, 2)
    assert summary.errors == {"HTTP 503: away": 2}
    assert summary.ttft.p99_ms == 1000.0
    assert summary.output_tokens == 4


def test_a_run_in_which_everything_failed_has_figures_too() -> None:
    summary = LoadSummary.of([record(error="x")])
    assert (summary.output_tokens_per_s, summary.requests_per_s) == (0.0, 0.0)
    assert summary.ttft == Percentiles(None, None)


def test_a_wave_decodes_while_all_its_requests_do() -> None:
    wave = WaveSummary.of([record(1.0, 2.0, 3.0, 4.0), record(2.0, 3.0, 4.0, 5.0)])
    assert wave.prefill_s == 2.0
    # Between 2.0 and 4.0: two tokens of each.
    assert wave.decode_tokens_per_s == 2.0
    assert wave.output_tokens_per_s == 8 / 5


def test_a_wave_whose_first_answer_ended_before_the_last_began_has_no_decode_rate() -> None:
    assert WaveSummary.of([record(1.0, 2.0), record(3.0, 4.0)]).decode_tokens_per_s is None


def test_a_rate_runs_from_the_first_to_the_last_token_of_its_window() -> None:
    assert rate_between([0.0, 1.0, 2.0, 3.0, 4.0, 9.0], 0.5, 4.5) == pytest.approx(1.0)


def test_a_request_without_two_moments_in_the_window_leaves_all_of_them_without_a_rate() -> None:
    times_s = [(0.0, 1.0, 2.0), (1.5, 1.5, 3.0)]
    assert decode_rate(times_s, 1.0, 2.0) is None
    assert decode_rate(times_s, 1.0, 3.0) == 1.0 + 2 / 1.5


def test_a_wave_loses_no_token_of_a_step_whose_answers_come_a_moment_apart() -> None:
    wave = WaveSummary.of([record(1.0, 2.0, 3.0), record(1.1, 2.1, 3.1)])
    assert wave.decode_tokens_per_s == pytest.approx(2.0, rel=0.1)

"""When a replica is called and when it is probed."""

from __future__ import annotations

import pytest

from router.workers.circuit import (
    BUSY_S,
    IDLE_S,
    MAX_QUARANTINE_S,
    PROBE_PAUSE_S,
    QUARANTINE_S,
    WRONG_ANSWERS,
    WRONG_WINDOW_S,
    Circuit,
    CircuitState,
)


@pytest.fixture
def circuit() -> Circuit:
    return Circuit(0.0)


def probe(circuit: Circuit, now_s: float) -> None:
    assert circuit.is_probe_due(now_s)
    circuit.begin_probe()


def test_the_first_failure_makes_a_suspect_and_the_second_one_opens(circuit: Circuit) -> None:
    circuit.note_failure(1.0)
    assert circuit.state is CircuitState.SUSPECT and circuit.lets_calls_through
    circuit.note_failure(1.0)
    assert circuit.state is CircuitState.OPEN and not circuit.lets_calls_through


def test_a_right_answer_in_between_forgives(circuit: Circuit) -> None:
    for _ in range(10):
        circuit.note_failure(1.0)
        circuit.note_right(1.0)
    assert circuit.state is CircuitState.CLOSED


def test_a_suspect_is_probed_at_once_and_opens_with_the_probe_that_it_misses(circuit: Circuit) -> None:
    circuit.note_late(1.0)
    probe(circuit, 1.0)
    circuit.fail_probe(1.5, is_silent=True)
    assert circuit.state is CircuitState.OPEN


def test_an_open_circuit_closes_with_the_first_probe_that_is_answered(circuit: Circuit) -> None:
    circuit.open(1.0)
    assert not circuit.is_probe_due(1.0)
    probe(circuit, 1.0 + PROBE_PAUSE_S)
    assert circuit.state is CircuitState.HALF_OPEN and not circuit.is_probe_due(2.0)
    circuit.fail_probe(2.0, is_silent=True)
    assert circuit.state is CircuitState.OPEN
    probe(circuit, 2.0 + PROBE_PAUSE_S)
    circuit.pass_probe(2.2)
    assert circuit.state is CircuitState.CLOSED


def test_a_replica_that_is_merely_busy_is_no_more_than_a_suspect(circuit: Circuit) -> None:
    now_s = IDLE_S
    while now_s < BUSY_S:
        probe(circuit, now_s)
        circuit.fail_probe(now_s, is_silent=True)
        assert circuit.state is CircuitState.SUSPECT
        now_s += PROBE_PAUSE_S
    for _ in range(2):
        probe(circuit, now_s)
        circuit.fail_probe(now_s, is_silent=True)
        now_s += PROBE_PAUSE_S
    assert circuit.state is CircuitState.OPEN


def test_a_replica_that_refuses_connections_is_soon_not_called(circuit: Circuit) -> None:
    probe(circuit, IDLE_S)
    circuit.fail_probe(IDLE_S, is_silent=False)
    probe(circuit, IDLE_S + PROBE_PAUSE_S)
    circuit.fail_probe(IDLE_S + PROBE_PAUSE_S, is_silent=False)
    assert circuit.state is CircuitState.OPEN


def test_wrong_answers_within_the_window_are_a_quarantine(circuit: Circuit) -> None:
    for number in range(WRONG_ANSWERS * 2):
        assert not circuit.note_wrong(number * WRONG_WINDOW_S)
    assert [circuit.note_wrong(100.0) for _ in range(WRONG_ANSWERS)] == [False, False, True]
    assert circuit.state is CircuitState.QUARANTINED


def test_the_pauses_of_a_quarantine_grow_up_to_the_longest(circuit: Circuit) -> None:
    for _ in range(WRONG_ANSWERS):
        circuit.note_wrong(0.0)
    now_s, pause_s = 0.0, QUARANTINE_S
    for _ in range(10):
        assert not circuit.is_probe_due(now_s + pause_s - 0.01)
        now_s += pause_s
        probe(circuit, now_s)
        circuit.note_failure(now_s)
        circuit.note_right(now_s)
        circuit.fail_probe(now_s, is_silent=False)
        assert circuit.state is CircuitState.QUARANTINED
        pause_s = min(MAX_QUARANTINE_S, 2 * pause_s)
    assert pause_s == MAX_QUARANTINE_S

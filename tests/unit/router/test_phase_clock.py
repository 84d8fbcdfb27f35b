"""Where a step's time goes, by phase."""

from __future__ import annotations

import pytest

from router.phase_clock import INSIDE_FORWARD, Phase, PhaseClock


def test_every_phase_is_reported_by_its_name_whether_it_was_entered_or_not() -> None:
    clock = PhaseClock()
    clock.add(Phase.WIRE, 0.25)
    clock.add(Phase.WIRE, 0.5)
    seconds = clock.snapshot()
    assert list(seconds) == [phase.value for phase in Phase]
    assert seconds["wire"] == 0.75 and sum(seconds.values()) == 0.75


def test_a_block_counts_for_its_own_phase_even_when_it_raises() -> None:
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.phase(Phase.GATE):
        raise KeyError
    assert {name for name, spent in clock.snapshot().items() if spent} == {"gate"}


def test_what_the_forward_holds_is_all_between_attention_and_the_dense_rest() -> None:
    clock = PhaseClock()
    for phase in Phase:
        clock.add(phase, 1.0)
    assert clock.total(INSIDE_FORWARD) == 10.0
    assert not {Phase.SCHEDULE, Phase.DENSE, Phase.SAMPLE, Phase.DELIVER} & set(INSIDE_FORWARD)

"""When sequences that lack an expert are tried again, and when their wait is over."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from support.fake_links import make_epoch
from support.views import plain_view

from moesaic.errors import DeadlineExceeded, Unavailable
from router.engine.epoch_tally import EpochTally
from router.engine.expert_waits import MARGIN_S, PAUSE_S, ExpertWaits
from router.engine.live_sequence import LiveSequence
from router.engine.request import SequenceRequest
from router.engine.sampling_params import SamplingParams

MAX_WAIT_S = 30.0
ERROR = Unavailable("layer 3 slot 1 has no replica left", reason="NO_REPLICA", retry_after_s=1.0)
VIEW = plain_view(make_epoch(1, 1))


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Rig:
    clock: Clock = field(default_factory=Clock)
    replicas: object = field(default_factory=object)

    def __post_init__(self) -> None:
        self.waits = ExpertWaits(MAX_WAIT_S, clock=self.clock)

    def sequence(self, name: str = "a", timeout_s: float = 600.0) -> LiveSequence:
        deadline_s = self.clock.now_s + timeout_s
        request = SequenceRequest(
            name, (1, 2), SamplingParams(max_tokens=8), deadline_s, lambda _: None, VIEW
        )
        return LiveSequence(request, EpochTally())

    def fail(self, live: LiveSequence, took_s: float = 0.0) -> LiveSequence:
        self.waits.note(live, ERROR, took_s, self.replicas)
        return live

    def due(self) -> list[LiveSequence]:
        return self.waits.take_due(self.replicas)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nobody_waits_at_first(rig: Rig) -> None:
    assert rig.due() == [] and rig.waits.over() == [] and rig.waits.next_s() is None


def test_a_sequence_is_tried_again_after_a_pause(rig: Rig) -> None:
    live = rig.fail(rig.sequence())
    rig.clock.now_s += 0.9 * PAUSE_S
    assert rig.due() == []
    rig.clock.now_s += 0.2 * PAUSE_S
    assert rig.due() == [live]
    # Not once more until that try has failed, too.
    rig.clock.now_s += 10 * PAUSE_S
    assert rig.due() == []


def test_a_change_of_the_replicas_ends_the_pause(rig: Rig) -> None:
    live = rig.fail(rig.sequence())
    assert rig.due() == []
    rig.replicas = object()
    assert rig.due() == [live]
    rig.fail(live)
    assert rig.due() == []


def test_a_try_that_takes_long_is_followed_by_a_pause_as_long(rig: Rig) -> None:
    live = rig.fail(rig.sequence(), took_s=4.0)
    rig.clock.now_s += 3.9
    assert rig.due() == []
    rig.clock.now_s += 0.2
    assert rig.due() == [live]


def test_all_are_tried_together(rig: Rig) -> None:
    first = rig.fail(rig.sequence("a"))
    rig.clock.now_s += 0.8 * PAUSE_S
    second = rig.fail(rig.sequence("b"))
    rig.clock.now_s += 0.3 * PAUSE_S
    assert rig.due() == [first, second]


def test_a_wait_is_over_after_the_longest_time_since_it_began(rig: Rig) -> None:
    live = rig.fail(rig.sequence())
    rig.clock.now_s += 0.7 * MAX_WAIT_S
    rig.fail(live)
    assert rig.waits.over() == []
    rig.clock.now_s += 0.4 * MAX_WAIT_S
    ((ended, error),) = rig.waits.over()
    assert ended is live and type(error) is Unavailable and error.reason == "NO_REPLICA"
    assert error.message == "layer 3 slot 1 has no replica left; waited 33 s for it after 0 tokens"
    assert error.retry_after_s == 1.0


def test_a_wait_that_ended_begins_anew(rig: Rig) -> None:
    live = rig.fail(rig.sequence())
    rig.clock.now_s += 0.7 * MAX_WAIT_S
    rig.waits.end(live)
    assert len(rig.waits) == 0
    rig.fail(live)
    rig.clock.now_s += 0.7 * MAX_WAIT_S
    assert rig.waits.over() == []


def test_the_deadline_ends_a_wait_while_the_caller_still_listens(rig: Rig) -> None:
    live = rig.sequence(timeout_s=5.0)
    live.sequence.append(7)
    rig.fail(live)
    rig.clock.now_s += 5.0 - MARGIN_S
    ((_, error),) = rig.waits.over()
    assert isinstance(error, DeadlineExceeded)
    assert error.message == "deadline passed after 1 tokens: layer 3 slot 1 has no replica left"

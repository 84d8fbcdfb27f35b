"""When a silent worker counts as lost: never by one question, by a sleep of the controller, or by its deafness."""

from __future__ import annotations

from cluster.control.loss import BEAT_S, MAX_LAG_S, Losses

WORKERS = frozenset({"w0", "w1", "w2", "w3"})


class Clock:
    """A controller's loop that is awake for as long as it is told, and hears the workers that it is told of."""

    def __init__(self, workers: frozenset[str] = WORKERS) -> None:
        self.losses = Losses(workers)
        self.now_s = 0.0
        self.hear(*workers)

    def pass_awake(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + BEAT_S)
            self.losses.beat(self.now_s)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def hear(self, *names: str) -> None:
        for name in names:
            self.losses.hear(name, self.now_s)

    def ask_in_vain(self, *names: str, answering: tuple[str, ...] = ()) -> dict[str, bool]:
        """Asks, waits for five seconds in which `answering` are heard; whether each of `names` is lost now."""
        asked_s = self.now_s
        self.pass_awake(5.0)
        self.hear(*answering)
        return {name: self.losses.miss(name, asked_s, self.now_s) for name in names}


def test_one_missed_question_is_no_loss_and_a_second_one_is() -> None:
    clock = Clock()
    assert clock.ask_in_vain("w0", answering=("w1", "w2", "w3")) == {"w0": False}
    assert clock.ask_in_vain("w0", answering=("w1", "w2", "w3")) == {"w0": True}


def test_an_answer_in_between_begins_the_count_anew() -> None:
    clock = Clock()
    clock.ask_in_vain("w0", answering=("w1", "w2", "w3"))
    clock.hear("w0")
    assert clock.ask_in_vain("w0", answering=("w1", "w2", "w3")) == {"w0": False}


def test_a_controller_that_slept_through_its_questions_loses_nobody() -> None:
    clock = Clock()
    for _ in range(3):
        clock.pass_awake(1.0)
        asked_s = clock.now_s
        clock.sleep(12.0)
        assert not any(clock.losses.miss(name, asked_s, clock.now_s) for name in WORKERS)


def test_a_loop_that_is_a_little_late_has_not_slept() -> None:
    clock = Clock(frozenset({"w0", "w1"}))
    lost = False
    for _ in range(2):
        asked_s = clock.now_s
        clock.sleep(BEAT_S + MAX_LAG_S)
        clock.hear("w1")
        lost = clock.losses.miss("w0", asked_s, clock.now_s)
    assert lost


def test_a_controller_that_hears_fewer_than_it_would_lose_loses_nobody() -> None:
    clock = Clock()
    for _ in range(5):
        assert not any(clock.ask_in_vain("w0", "w2", "w3", answering=("w1",)).values())


def test_of_half_that_fall_silent_at_once_all_are_lost() -> None:
    clock = Clock()
    clock.ask_in_vain("w0", "w1", answering=("w2", "w3"))
    assert clock.ask_in_vain("w0", "w1", answering=("w2", "w3")) == {"w0": True, "w1": True}


def test_the_only_worker_is_never_lost_by_silence() -> None:
    clock = Clock(frozenset({"w0"}))
    for _ in range(5):
        assert clock.ask_in_vain("w0") == {"w0": False}


def test_the_dead_count_neither_as_heard_nor_as_silent() -> None:
    clock = Clock()
    clock.losses.die("w2")
    clock.losses.die("w3")
    clock.ask_in_vain("w0", answering=("w1",))
    assert clock.ask_in_vain("w0", answering=("w1",)) == {"w0": True}


def test_a_worker_that_was_never_heard_is_silent_as_well() -> None:
    clock = Clock()
    clock.losses = Losses(WORKERS)
    for _ in range(3):
        assert not any(clock.ask_in_vain(*WORKERS).values())

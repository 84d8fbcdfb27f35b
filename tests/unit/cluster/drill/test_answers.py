"""Every token is compared with the reference's at its place."""

from __future__ import annotations

import pytest

from cluster.bench.latency import RequestRecord
from cluster.drill.answers import Answer, Tally, wrong_tokens

REFERENCE = [(1, 2, 3), (4, 5, 6)]


def answer(
    prompt: int, *ids: int, error: str = "", epochs: tuple[str, ...] = ("e",), refused: int = 0
) -> Answer:
    times_s = tuple(map(float, range(len(ids))))
    record = RequestRecord(0.0, 9.0, 2, times_s, ids, error, frozenset(epochs))
    return Answer(prompt, record, refused)


@pytest.mark.parametrize(
    ("got", "wrong"),
    [((1, 2, 3), 0), ((1, 2), 0), ((1, 9, 3), 1), ((1, 1, 2, 3), 3), ((1, 3), 1), ((1, 2, 3, 4), 1), ((), 0)],
)
def test_a_token_that_is_wrong_doubled_skipped_or_too_many_is_counted(
    got: tuple[int, ...], wrong: int
) -> None:
    assert wrong_tokens(got, (1, 2, 3)) == wrong


def test_lost_requests_are_counted_with_their_errors_and_their_tokens_are_compared_too() -> None:
    tally = Tally.of(
        [answer(0, 1, 2, 3), answer(1, 4, 0, error="broke off"), answer(1, error="broke off")], REFERENCE
    )
    assert (tally.requests, tally.lost, tally.wrong_tokens) == (3, 2, 1)
    assert tally.errors == {"broke off": 2}


def test_an_answer_of_two_epochs_or_of_none_is_mixed_and_one_without_tokens_is_not() -> None:
    answers = [
        answer(0, 1, 2, 3, epochs=("e", "f")),
        answer(0, 1, epochs=()),
        answer(0, error="refused", epochs=()),
        answer(0, 1, 2, 3),
    ]
    assert Tally.of(answers, REFERENCE).mixed == 2


def test_refusals_whose_clients_came_back_are_no_losses() -> None:
    tally = Tally.of([answer(0, 1, 2, 3, refused=4)], REFERENCE)
    assert (tally.lost, tally.refused) == (0, 4)

"""Every token is compared with the reference's at its place."""

from __future__ import annotations

import pytest

from cluster.bench.latency import RequestRecord
from cluster.drill.answers import Answer, Tally, wrong_tokens

REFERENCES = {"e": [(1, 2, 3), (4, 5, 6)], "f": [(1, 2, 9), (4, 5, 9)]}


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
        [answer(0, 1, 2, 3), answer(1, 4, 0, error="broke off"), answer(1, error="broke off")], REFERENCES
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
    assert Tally.of(answers, REFERENCES).mixed == 2


def test_refusals_whose_clients_came_back_are_no_losses() -> None:
    tally = Tally.of([answer(0, 1, 2, 3, refused=4)], REFERENCES)
    assert (tally.lost, tally.refused) == (0, 4)


@pytest.mark.parametrize(
    ("epochs", "ids", "wrong"),
    [
        (("e",), (1, 2, 3), 0),
        (("f",), (1, 2, 9), 0),
        (("f",), (1, 2, 3), 1),
        (("e", "f"), (1, 2, 9), 0),
        (("e", "f"), (1, 8, 9), 1),
        (("g",), (1, 2, 3), 3),
        ((), (1, 2, 3), 3),
    ],
)
def test_an_answer_is_compared_with_the_reference_of_the_epoch_that_it_names(
    epochs: tuple[str, ...], ids: tuple[int, ...], wrong: int
) -> None:
    assert Tally.of([answer(0, *ids, epochs=epochs)], REFERENCES).wrong_tokens == wrong

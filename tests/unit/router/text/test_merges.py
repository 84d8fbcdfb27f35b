"""Merges from scores, against those of transformers."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from transformers.convert_slow_tokenizer import generate_merges

from router.text.merges import merges_by_score


@given(st.dictionaries(st.text("abc", min_size=1, max_size=6), st.integers(-5, 0).map(float), max_size=40))
def test_they_are_those_of_transformers_in_the_same_order(scores: dict[str, float]) -> None:
    ids = {piece: index for index, piece in enumerate(scores)}
    assert merges_by_score(scores) == generate_merges(ids, scores)


def test_the_best_piece_is_merged_first_and_its_parts_must_be_pieces() -> None:
    scores = {"a": -5.0, "b": -6.0, "ab": -1.0, "aba": -2.0, "xyz": 0.0}
    assert merges_by_score(scores) == [("a", "b"), ("ab", "a")]

"""The highest scores of a row, in one order whatever the ties."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from router.top_k import top_ids

# Few values, so that ties are common, and both zeros and infinities among them.
SCORES = st.sampled_from([-torch.inf, -2.5, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3.5, torch.inf])


@given(scores=st.lists(SCORES, min_size=1, max_size=40), data=st.data())
def test_scores_come_highest_first_and_equal_ones_by_id(scores: list[float], data: st.DataObject) -> None:
    num = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:num]
    assert top_ids(torch.tensor([scores]), torch.arange(len(scores)), num).tolist() == [expected]


def test_every_row_may_have_ids_of_its_own() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    ids = torch.tensor([[7, 3, 9], [200_000, 5, 4]])
    assert top_ids(scores, ids, 3).tolist() == [[3, 7, 9], [4, 5, 200_000]]

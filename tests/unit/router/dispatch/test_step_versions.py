"""Rows of several epochs, grouped by version."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from moesaic.epoch import Epoch, ExpertAddress
from router.dispatch.row_grouping import RowsBySlot
from router.dispatch.step_versions import StepVersions
from router.gating.gate import NO_SLOT
from router.gating.model_view import ModelView, ViewRows


def view_of(*versions: int, model: str = "m") -> ModelView:
    """A layer whose slots have these versions; 0: no such slot."""
    slots = {ExpertAddress(0, slot): bytes([of]) * 32 for slot, of in enumerate(versions) if of}
    return ModelView.plain(Epoch.of(model, slots))


def groups_of(
    views: list[ViewRows], slots: list[list[int]], tokens: list[int] | None = None
) -> dict[tuple[int, int], list[int]]:
    """By slot and version: the assignments."""
    groups, versions = StepVersions(views).group(0, torch.tensor(slots), views, tokens)
    found = {
        (slot, version[0]): [int(one) for one in groups.assignments_of(group)]
        for group, (slot, version) in enumerate(zip(groups.slots, versions, strict=True))
    }
    assert len(found) == len(groups.slots)
    return found


def test_one_epoch_is_grouped_by_slot_as_ever() -> None:
    views = [ViewRows(view_of(1, 2, 3), 0, 0)]
    slots = torch.tensor([[0, 2], [2, NO_SLOT]])
    groups, versions = StepVersions(views).group(0, slots, views, None)
    assert groups.slots == RowsBySlot.of(slots).slots == [0, 2]
    assert [version[0] for version in versions] == [1, 3]


def test_a_version_of_two_epochs_is_one_group_and_two_versions_of_a_slot_are_two() -> None:
    views = [ViewRows(view_of(1, 2), 0, 1), ViewRows(view_of(1, 9), 1, 3)]
    assert StepVersions(views).epoch == ",".join(run.view.epoch.id for run in views)
    assert groups_of(views, [[0, 1], [1, 0], [NO_SLOT, 1]]) == {
        (0, 1): [0, 3],
        (1, 2): [1],
        (1, 9): [2, 5],
    }


def test_policies_of_one_epoch_are_no_other_versions() -> None:
    view = view_of(1, 2)
    views = [ViewRows(view, 0, 1), ViewRows(ModelView(view.epoch, "other", view.versions, {}), 1, 2)]
    assert StepVersions(views).epoch == view.epoch.id
    assert groups_of(views, [[0], [0]]) == {(0, 1): [0, 1]}


def test_of_fewer_tokens_each_is_in_its_own_epoch() -> None:
    views = [ViewRows(view_of(1), 0, 2), ViewRows(view_of(2), 2, 4)]
    assert groups_of(views, [[0], [0]], tokens=[1, 3]) == {(0, 1): [0], (0, 2): [1]}


@given(st.data())
def test_every_row_is_computed_by_the_version_of_its_own_epoch(data: st.DataObject) -> None:
    num_views, num_ranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    epochs = data.draw(
        st.lists(st.lists(st.integers(1, 3), min_size=4, max_size=6), min_size=num_views, max_size=num_views)
    )
    views, slots, expected, start = [], [], {}, 0
    for index, versions in enumerate(epochs):
        view, count = view_of(*versions, model=str(index)), data.draw(st.integers(1, 3))
        views.append(ViewRows(view, start, start + count))
        for token in range(start, start + count):
            row = data.draw(
                st.lists(st.integers(NO_SLOT, len(versions) - 1), min_size=num_ranks, max_size=num_ranks)
            )
            slots.append(row)
            for rank, slot in enumerate(row):
                if slot != NO_SLOT:
                    expected.setdefault((slot, versions[slot]), []).append(token * num_ranks + rank)
        start += count
    assert groups_of(views, slots) == expected

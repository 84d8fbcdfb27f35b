"""Assignments sorted by slot, and what each worker is sent of them."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from router.dispatch.row_grouping import RowsBySlot
from router.gating.gate import NO_SLOT


def test_slots_ascend_and_keep_the_order_of_tokens() -> None:
    groups = RowsBySlot.of(torch.tensor([[3, 1], [1, 0]]))
    assert groups.slots == [0, 1, 3]
    assert [groups.assignments_of(group).tolist() for group in range(3)] == [[3], [1, 2], [0]]
    assert [groups.tokens_of(group) for group in range(3)] == [[1], [0, 1], [0]]


def test_ranks_without_a_slot_are_asked_of_nobody() -> None:
    groups = RowsBySlot.of(torch.tensor([[3, 1], [1, NO_SLOT], [NO_SLOT, NO_SLOT]]))
    assert groups.slots == [1, 3]
    assert [groups.assignments_of(group).tolist() for group in range(2)] == [[1, 2], [0]]
    assert groups.unassigned.tolist() == [3, 4, 5]
    nobody = RowsBySlot.of(torch.full((2, 2), NO_SLOT))
    assert nobody.slots == [] and len(nobody.unassigned) == 4


def test_a_single_token_is_ordered_as_many_are() -> None:
    for slots in ([5, NO_SLOT, 2], [NO_SLOT, NO_SLOT], [4]):
        alone, beside = RowsBySlot.of(torch.tensor([slots])), RowsBySlot.of(torch.tensor([slots, slots]))
        assert alone.slots == beside.slots
        assert list(alone.unassigned) == [rank for rank, slot in enumerate(slots) if slot == NO_SLOT]
        for group, slot in enumerate(alone.slots):
            assert list(alone.assignments_of(group)) == [slots.index(slot)]
            assert alone.tokens_of(group) == [0]
            rows = alone.worker_rows([group])
            assert (rows.slots, rows.counts, rows.hidden_rows) == ([slot], [1], [0])
            assert rows.tokens is None and rows.num_tokens == 1


def test_whoever_computes_every_token_is_sent_all_without_a_choice() -> None:
    rows = RowsBySlot.of(torch.tensor([[3, 1], [1, 0]])).worker_rows([1])
    assert rows.tokens is None and rows.num_tokens == 2
    assert (rows.slots, rows.counts, rows.hidden_rows) == ([1], [2], [0, 1])


def test_whoever_computes_few_tokens_is_sent_just_these() -> None:
    rows = RowsBySlot.of(torch.tensor([[0, 1], [2, 3], [0, 3]])).worker_rows([1, 2])
    assert rows.tokens is not None and rows.tokens.tolist() == [0, 1]
    assert (rows.slots, rows.counts, rows.hidden_rows) == ([1, 2], [1, 1], [0, 1])


@given(
    num_tokens=st.integers(1, 20),
    num_ranks=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_every_assignment_is_asked_of_just_one_part_and_finds_its_token_there(
    num_tokens: int, num_ranks: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.rand(num_tokens, 8, generator=generator).topk(num_ranks).indices
    groups = RowsBySlot.of(slots)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(groups.slots), max_size=len(groups.slots)))
    seen = []
    for owner in set(owners):
        rows = groups.worker_rows([group for group, one in enumerate(owners) if one == owner])
        sent = list(range(num_tokens)) if rows.tokens is None else rows.tokens.tolist()
        assert rows.num_tokens == len(sent)
        slot_of_row = [
            slot for slot, count in zip(rows.slots, rows.counts, strict=True) for _ in range(count)
        ]
        for assignment, row, slot in zip(rows.assignments, rows.hidden_rows, slot_of_row, strict=True):
            token, rank = divmod(int(assignment), num_ranks)
            assert sent[row] == token and slots[token, rank] == slot
        seen += map(int, rows.assignments)
    assert sorted(seen) == list(range(num_tokens * num_ranks))

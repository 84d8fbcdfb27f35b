"""Assignments sorted by slot, and what each worker is sent of them."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from router.dispatch.row_grouping import SlotOrder
from router.gating.gate import NO_SLOT


def test_slots_ascend_and_keep_the_order_of_tokens() -> None:
    order = SlotOrder.of(torch.tensor([[3, 1], [1, 0]]))
    assert order.slots == [0, 1, 3]
    assert [order.assignments_of(place).tolist() for place in range(3)] == [[3], [1, 2], [0]]
    assert [order.tokens_of(place) for place in range(3)] == [[1], [0, 1], [0]]


def test_ranks_without_a_slot_are_asked_of_nobody() -> None:
    order = SlotOrder.of(torch.tensor([[3, 1], [1, NO_SLOT], [NO_SLOT, NO_SLOT]]))
    assert order.slots == [1, 3]
    assert [order.assignments_of(place).tolist() for place in range(2)] == [[1, 2], [0]]
    assert order.empty.tolist() == [3, 4, 5]
    nobody = SlotOrder.of(torch.full((2, 2), NO_SLOT))
    assert nobody.slots == [] and len(nobody.empty) == 4


def test_a_single_token_is_ordered_as_many_are() -> None:
    for slots in ([5, NO_SLOT, 2], [NO_SLOT, NO_SLOT], [4]):
        alone, beside = SlotOrder.of(torch.tensor([slots])), SlotOrder.of(torch.tensor([slots, slots]))
        assert alone.slots == beside.slots
        assert list(alone.empty) == [rank for rank, slot in enumerate(slots) if slot == NO_SLOT]
        for place, slot in enumerate(alone.slots):
            assert list(alone.assignments_of(place)) == [slots.index(slot)]
            assert alone.tokens_of(place) == [0]
            part = alone.part([place])
            assert (part.slots, part.counts, part.rows) == ([slot], [1], [0])
            assert part.tokens is None and part.num_tokens == 1


def test_whoever_computes_every_token_is_sent_all_without_a_choice() -> None:
    part = SlotOrder.of(torch.tensor([[3, 1], [1, 0]])).part([1])
    assert part.tokens is None and part.num_tokens == 2
    assert (part.slots, part.counts, part.rows) == ([1], [2], [0, 1])


def test_whoever_computes_few_tokens_is_sent_just_these() -> None:
    part = SlotOrder.of(torch.tensor([[0, 1], [2, 3], [0, 3]])).part([1, 2])
    assert part.tokens is not None and part.tokens.tolist() == [0, 1]
    assert (part.slots, part.counts, part.rows) == ([1, 2], [1, 1], [0, 1])


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
    order = SlotOrder.of(slots)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(order.slots), max_size=len(order.slots)))
    seen = []
    for owner in set(owners):
        part = order.part([place for place, one in enumerate(owners) if one == owner])
        sent = list(range(num_tokens)) if part.tokens is None else part.tokens.tolist()
        assert part.num_tokens == len(sent)
        slot_of_row = [
            slot for slot, count in zip(part.slots, part.counts, strict=True) for _ in range(count)
        ]
        for assignment, row, slot in zip(part.assignments, part.rows, slot_of_row, strict=True):
            token, rank = divmod(int(assignment), num_ranks)
            assert sent[row] == token and slots[token, rank] == slot
        seen += map(int, part.assignments)
    assert sorted(seen) == list(range(num_tokens * num_ranks))

"""Gates some of whose slots nobody computes at the moment."""

from __future__ import annotations

import pytest
import torch
from support.gates import NUM_SLOTS, RULES, draw_gate, draw_hidden

from moesaic.epoch import Epoch
from router.gating.absence import Absence, StandIn, stand_in_of
from router.gating.gate import NO_SLOT, Assignment, Gate
from router.gating.model_view import GateView, ModelView, ViewRows

LAYER = 3
ABSENT = frozenset({2, 5})
STAND_INS: tuple[StandIn, ...] = ("substitute", "renormalise")


def assign(
    gate: Gate, hidden: torch.Tensor, stand_in: StandIn, *, absent: frozenset[int] = ABSENT
) -> tuple[Assignment, int]:
    absence = Absence({LAYER: absent}, stand_in)
    views = [ViewRows(ModelView(Epoch.of("tiny", {}), "view", {}, {}), 0, 0, absence)]
    return gate.assign_views(LAYER, hidden, views), absence.num_affected


def chooses(chosen: Assignment, absent: frozenset[int] = ABSENT) -> torch.Tensor:
    """[T, K]: which ranks are absent slots."""
    return torch.isin(chosen.slots, torch.tensor(sorted(absent)))


def test_only_two_words_let_an_answer_go_on_without_an_expert() -> None:
    assert [stand_in_of(word) for word in ("wait", "fail")] == [None, None]
    assert [stand_in_of(word) for word in STAND_INS] == [*STAND_INS]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_what_wants_no_absent_slot_keeps_its_bits_and_the_others_are_counted(
    name: str, stand_in: StandIn
) -> None:
    gate, hidden = draw_gate(2, RULES[name]), draw_hidden(1, 60)
    full = gate.assign(hidden)
    found, num_affected = assign(gate, hidden, stand_in)
    untouched = ~chooses(full).any(dim=1)
    assert 0 < untouched.sum() < 60
    assert torch.equal(found.slots[untouched], full.slots[untouched])
    assert torch.equal(found.weights[untouched], full.weights[untouched])
    assert num_affected == chooses(full).sum()


@pytest.mark.parametrize("name", RULES)
def test_the_next_ranked_slot_takes_the_place_as_if_the_absent_one_never_was(name: str) -> None:
    rule = RULES[name]
    gate, hidden = draw_gate(2, rule), draw_hidden(1, 60)
    touched = chooses(gate.assign(hidden)).any(dim=1)
    left = tuple(slot for slot in range(NUM_SLOTS) if slot not in ABSENT)
    never = gate.assign_view(GateView(left, rule.top_k, {}), hidden, gate.logits(hidden))
    found, _ = assign(gate, hidden, "substitute")
    assert not chooses(found).any()
    assert torch.equal(found.slots[touched], never.slots[touched])
    assert torch.equal(found.weights[touched], never.weights[touched])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nllb"])
def test_the_others_get_the_weight_of_a_slot_that_is_left_out_where_weights_have_a_fixed_sum(
    name: str,
) -> None:
    gate, hidden = draw_gate(2, RULES[name]), draw_hidden(1, 60)
    full, (found, _) = gate.assign(hidden), assign(gate, hidden, "renormalise")
    some_left = (~chooses(full) & (full.slots != NO_SLOT)).any(dim=1)
    assert not chooses(found)[some_left].any()
    assert torch.allclose(found.weights.sum(1), full.weights.sum(1))
    kept = found.weights != 0
    ratio = torch.where(kept, found.weights / full.weights, 0)
    assert torch.allclose(ratio.amax(1), torch.where(kept, ratio, torch.inf).amin(1))


@pytest.mark.parametrize("name", ["olmoe", "phimoe"])
def test_weights_stay_as_they_are_where_the_family_does_not_renormalise(name: str) -> None:
    gate, hidden = draw_gate(2, RULES[name]), draw_hidden(1, 60)
    full, (found, _) = gate.assign(hidden), assign(gate, hidden, "renormalise")
    kept = found.slots != NO_SLOT
    assert torch.equal(found.weights[kept], full.weights[kept]) and not found.weights[~kept].any()


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_a_token_that_would_have_nothing_left_keeps_its_choice(stand_in: StandIn) -> None:
    gate, hidden = draw_gate(2, RULES["mixtral"]), draw_hidden(1, 20)
    found, _ = assign(gate, hidden, stand_in, absent=frozenset(range(NUM_SLOTS)))
    assert torch.equal(found.slots, gate.assign(hidden).slots)


def test_only_rows_of_the_sequence_that_does_without_are_changed() -> None:
    gate, hidden = draw_gate(2, RULES["mixtral"]), draw_hidden(1, 40)
    view = ModelView(Epoch.of("tiny", {}), "view", {}, {})
    absence = Absence({LAYER: ABSENT}, "substitute")
    views = [ViewRows(view, 0, 10), ViewRows(view, 10, 30, absence), ViewRows(view, 30, 40)]
    found, full = gate.assign_views(LAYER, hidden, views), gate.assign(hidden)
    others = [*range(10), *range(30, 40)]
    assert torch.equal(found.slots[others], full.slots[others])
    assert not chooses(found)[10:30].any()
    assert absence.num_affected == chooses(full)[10:30].sum()
    assert torch.equal(gate.assign_views(LAYER + 1, hidden, views).slots, full.slots)

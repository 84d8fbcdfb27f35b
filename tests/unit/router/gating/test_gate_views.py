"""Gates as several views of a model see them: slots left out, added, and scored by other rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.gates import GPT_OSS, HIDDEN_SIZE, MIXTRAL, NUM_SLOTS, RULES, draw_gate, draw_hidden, draw_row

from moesaic.epoch import Epoch, GateRow
from moesaic.families.model import GateRule
from router.gating.gate import NO_SLOT, assign
from router.gating.model_view import GateView, ModelView, ViewRows


def whole(view: GateView | None, name: str = "view") -> list[ViewRows]:
    """All rows, which see the gate of layer 3 in this way."""
    gates = {} if view is None else {3: view}
    return [ViewRows(ModelView(Epoch.of("tiny", {}), name, {}, gates), 0, 0)]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_view_without_a_slot_has_the_very_numbers_of_a_gate_without_its_row(
    name: str, invariant: bool
) -> None:
    rule, hidden, kept = RULES[name], draw_hidden(1), (0, 2, 3, 6, 7)
    gate = draw_gate(2, rule, invariant=invariant)
    views = whole(GateView(kept, rule.top_k, {}))
    found, expected = gate.assign_views(3, hidden, views), assign(gate.logits(hidden)[:, list(kept)], rule)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.slots, torch.tensor([*kept, NO_SLOT])[expected.slots])
    assert torch.equal(gate.assign_views(4, hidden, views).slots, gate.assign(hidden).slots)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_an_added_row_scores_as_if_the_gate_had_it(name: str, invariant: bool) -> None:
    rule, hidden = RULES[name], draw_hidden(1, 40)
    gate = draw_gate(2, rule, invariant=invariant)
    # Slot 9, because 8 was given up, and slot 1 with another row.
    new = {1: draw_row(4), 9: draw_row(3)}
    found = gate.assign_views(3, hidden, whole(GateView((*range(NUM_SLOTS), 9), rule.top_k, new)))
    rows = torch.stack([torch.frombuffer(bytearray(row.values), dtype=torch.float32) for row in new.values()])
    logits = torch.cat((gate.logits(hidden), hidden @ rows.T), dim=1)[:, [0, 8, *range(2, 8), 9]]
    expected = assign(logits, rule)
    slots = torch.tensor([*range(NUM_SLOTS), 9, NO_SLOT])[expected.slots]
    assert torch.equal(found.slots, slots) and (slots == 9).any() and (slots == 1).any()
    torch.testing.assert_close(found.weights, expected.weights)


def test_where_weights_are_renormalised_an_added_slot_that_is_not_chosen_changes_no_bit() -> None:
    gate, hidden = draw_gate(2, MIXTRAL), draw_hidden(1, 60)
    plain = gate.assign(hidden)
    grown = gate.assign_views(3, hidden, whole(GateView(tuple(range(9)), 2, {8: draw_row(3)})))
    unchosen = (grown.slots != 8).all(dim=1)
    assert 10 < unchosen.sum() < 55
    assert torch.equal(plain.weights[unchosen], grown.weights[unchosen])
    assert torch.equal(plain.slots[unchosen], grown.slots[unchosen])


def test_a_slot_that_scores_far_above_all_others_takes_all_the_weight() -> None:
    row = GateRow((1000 * torch.ones(HIDDEN_SIZE)).numpy().tobytes())
    views = whole(GateView(tuple(range(9)), 2, {8: row}))
    found = draw_gate(2, MIXTRAL).assign_views(3, torch.ones(1, HIDDEN_SIZE), views)
    assert found.slots[0, 0] == 8 and found.weights[0, 0] > 0.999
    torch.testing.assert_close(found.weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", RULES)
def test_every_run_of_rows_is_assigned_as_its_own_view_says_and_short_ones_are_filled_up(name: str) -> None:
    rule, hidden = RULES[name], draw_hidden(5, 8)
    gate = draw_gate(2, rule, invariant=not rule.biased)
    grown = GateView((*range(NUM_SLOTS), 8), rule.top_k, {8: draw_row(3)})
    kinds = (None, grown, GateView((1, 4), 1, {}), None)
    edges = itertools.pairwise([0, 2, 5, 7, 8])
    runs = [
        ViewRows(whole(kind, str(index))[0].view, *edge)
        for index, (kind, edge) in enumerate(zip(kinds, edges, strict=True))
    ]
    found = gate.assign_views(3, hidden, runs)
    for run in runs:
        alone = gate.assign_views(3, hidden[run.start : run.end], [ViewRows(run.view, 0, 0)])
        count = alone.slots.shape[1]
        weights, slots = found.weights[run.start : run.end], found.slots[run.start : run.end]
        assert torch.equal(slots[:, :count], alone.slots) and (slots[:, count:] == NO_SLOT).all()
        torch.testing.assert_close(weights[:, :count], alone.weights)
        assert not weights[:, count:].any()


def test_a_bias_of_a_new_row_counts_as_those_of_the_gate_do() -> None:
    gate, hidden = draw_gate(2, GPT_OSS), draw_hidden(1)
    views = whole(GateView((0, 1, 8), 2, {8: replace(draw_row(3), bias=100.0)}))
    assert (gate.assign_views(3, hidden, views).slots[:, 0] == 8).all()
    rule = GateRule(1, score="sigmoid", selection_bias=True)
    gate = replace(draw_gate(2, rule), selection_bias=torch.zeros(NUM_SLOTS))
    views = whole(GateView((0, 1, 8), 1, {8: replace(draw_row(3), selection_bias=100.0)}))
    found = gate.assign_views(3, hidden, views)
    assert (found.slots == 8).all() and (found.weights < 1).all()

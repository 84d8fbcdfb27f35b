"""Views of an epoch: which ones are the same, and which epochs a model cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.errors import FailedPrecondition
from moesaic.expert_policy import ExpertPolicy
from router.gating.model_view import MAX_VIEWS, EpochViews, ViewRows, rows_among
from router.gating.policy import LayerShape

HIDDEN = 3
SHAPES = {0: LayerShape(2, 2), 1: LayerShape(2, 1)}
ROW = GateRow(torch.ones(HIDDEN).numpy().tobytes())


def epoch_of(*added: tuple[int, int], rows: tuple[tuple[int, int], ...] | None = None, **kept: Any) -> Epoch:
    slots = [(0, 0), (0, 1), (1, 0), (1, 1), *added]
    return Epoch.of(
        "tiny",
        {ExpertAddress(*address): bytes([*address]) * 16 for address in slots},
        gate_rows={ExpertAddress(*address): ROW for address in (added if rows is None else rows)},
        bundles=[EpochBundle("new", b"n" * 32, (), tuple(ExpertAddress(*address) for address in added))],
        **kept,
    )


def views_of(epoch: Epoch, shapes: dict[int, LayerShape] = SHAPES) -> EpochViews:
    return EpochViews(epoch, shapes, HIDDEN)


def test_an_epoch_of_the_folder_s_slots_leaves_every_gate_alone() -> None:
    plain = views_of(epoch_of()).plain
    assert not plain.gates and plain.key == plain.epoch.id
    assert plain.versions[1] == {0: bytes([1, 0]) * 16, 1: bytes([1, 1]) * 16}


def test_an_added_slot_changes_the_gate_of_its_layer_alone() -> None:
    plain = views_of(epoch_of((1, 2))).plain
    assert plain.key == plain.epoch.id and plain.gates.keys() == {1}
    gate = plain.gates[1]
    assert (gate.slots, gate.top_k, dict(gate.rows)) == ((0, 1, 2), 1, {2: ROW})


def test_a_swapped_slot_with_a_row_changes_the_gate_too() -> None:
    gate = views_of(epoch_of(rows=((0, 1),))).plain.gates[0]
    assert (gate.slots, dict(gate.rows)) == ((0, 1), {1: ROW})


def test_a_denied_slot_takes_its_row_with_it_and_what_is_left_may_be_the_folder_s() -> None:
    views = views_of(epoch_of((1, 2)))
    view = views.of(ExpertPolicy(deny=("new",)))
    assert view.gates[1].slots == (0, 1) and not view.gates[1].rows
    assert view.versions is views.plain.versions


def test_epochs_that_differ_in_an_expert_alone_have_the_same_gates() -> None:
    old = epoch_of((1, 2))
    new = Epoch.of(
        "tiny",
        {**old.versions, ExpertAddress(0, 0): b"x" * 32},
        gate_rows={address: replace(row) for address, row in old.gate_rows.items()},
        bundles=old.bundles,
    )
    views, others = views_of(old), views_of(new)
    assert views.plain.gates[1] is others.plain.gates[1]
    deny = ExpertPolicy(deny=("0:1",))
    assert views.of(deny).gates[0] is others.of(deny).gates[0]
    assert views.plain.key != others.plain.key


def test_policies_that_come_to_the_same_are_one_view_and_no_other_has_its_key() -> None:
    views = views_of(epoch_of((1, 2)))
    by_name, by_slot = views.of(ExpertPolicy(deny=("new",))), views.of(ExpertPolicy(deny=("1:2", "9:9")))
    assert by_name is by_slot
    assert views.of(ExpertPolicy(deny=("nobody",))) is views.plain is views.of(None)
    others = [views.of(ExpertPolicy(top_k=1)), views.of(ExpertPolicy(deny=("0:0",)))]
    assert len({views.plain.key, by_name.key, *(view.key for view in others)}) == 4
    assert views_of(epoch_of()).of(ExpertPolicy(top_k=1)).key != others[0].key


def test_views_of_many_policies_are_dropped_and_made_again() -> None:
    shapes = {0: LayerShape(MAX_VIEWS + 5, 2)}
    slots = range(MAX_VIEWS + 5)
    views = views_of(Epoch.of("tiny", {ExpertAddress(0, slot): bytes(32) for slot in slots}), shapes)
    made = [views.of(ExpertPolicy(deny=(f"0:{slot}",))) for slot in slots]
    assert views.of(ExpertPolicy(deny=(f"0:{slots[-1]}",))) is made[-1]
    again = views.of(ExpertPolicy(deny=("0:0",)))
    assert again is not made[0] and again.key == made[0].key


@pytest.mark.parametrize(
    ("epoch", "shapes", "why"),
    [
        (epoch_of((1, 2), rows=()), SHAPES, "layer 1 slot 2 has no gate row"),
        (epoch_of(), SHAPES | {2: LayerShape(2, 1)}, "layers"),
        (epoch_of(), SHAPES | {1: LayerShape(3, 1)}, "layer 1 lacks an expert"),
        (epoch_of((1, 2)), SHAPES | {1: LayerShape(2, 1, "the slots form groups")}, "the slots form groups"),
        (epoch_of(rows=((1, 0),)), SHAPES | {1: LayerShape(2, 1, "its own gate")}, "its own gate"),
    ],
    ids=["no row", "layers", "slots", "fixed", "fixed rows"],
)
def test_an_epoch_that_the_model_cannot_be_is_refused_with_the_reason(
    epoch: Epoch, shapes: dict[int, LayerShape], why: str
) -> None:
    with pytest.raises(FailedPrecondition, match=why) as refused:
        views_of(epoch, shapes)
    assert refused.value.field == "epoch"


def test_rows_of_another_size_or_with_a_bias_that_the_gates_have_not_are_refused() -> None:
    epoch = epoch_of((1, 2))
    for row in (GateRow(bytes(8)), replace(ROW, bias=1.0), replace(ROW, selection_bias=1.0)):
        spoiled = replace(epoch, gate_rows={ExpertAddress(1, 2): row})
        with pytest.raises(FailedPrecondition, match="gate row of layer 1 slot 2"):
            views_of(spoiled)
    biased = SHAPES | {1: LayerShape(2, 1, biased=True)}
    views_of(replace(epoch, gate_rows={ExpertAddress(1, 2): replace(ROW, bias=1.0)}), biased)


def test_rows_are_found_again_among_fewer_tokens() -> None:
    view = views_of(epoch_of()).plain
    runs = [ViewRows(view, 0, 3), ViewRows(view, 3, 4), ViewRows(view, 4, 9)]
    assert rows_among(runs, [1, 2, 5, 8]) == [ViewRows(view, 0, 2), ViewRows(view, 2, 4)]


def test_what_happens_where_an_expert_is_missing_makes_no_other_view() -> None:
    views = views_of(epoch_of())
    assert views.of(ExpertPolicy(on_missing="substitute")) is views.plain
    denied = ExpertPolicy(deny=["0:1"])
    assert views.of(denied | ExpertPolicy(on_missing="wait")) is views.of(denied)


def test_a_model_that_cannot_do_without_an_expert_refuses_the_words_that_ask_for_it() -> None:
    views = views_of(epoch_of(), SHAPES | {1: LayerShape(2, 1, "its own gate")})
    assert views.of(ExpertPolicy(on_missing="wait")) is views.of(ExpertPolicy(on_missing="fail"))
    for word in ("substitute", "renormalise"):
        with pytest.raises(FailedPrecondition, match=f"{word} is not available .* its own gate") as refused:
            views.of(ExpertPolicy(on_missing=word))
        assert refused.value.field == "experts.on_missing"

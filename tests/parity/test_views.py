"""Epochs and policies against models that were changed by hand: rows deleted, experts added and exchanged.

Against transformers within its usual tolerance and with the same greedy tokens; against our own engine, in its
batch-invariant mode, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hand_made import (
    HandMadeExpert,
    greedy,
    load_model,
    rows_just_below,
    save,
    with_added,
    with_swapped,
    without_slots,
)
from support.view_rig import Answer, ViewRig, view_rig

from moesaic.epoch import ExpertAddress
from router.gating.model_view import ModelView

pytestmark = pytest.mark.shared

TOLERANCE = 1e-4
NUM_NEW = 12
# By family: the folder of its golden, and whether a choice of the folder's slots alone has the weights that it had before.
FAMILIES = {
    "mixtral": ("hf_v4", True),
    "qwen3-moe": ("checkpoint", True),
    "olmoe": ("checkpoint", False),
    "flex-olmo": ("checkpoint", False),
}
DENIED = (3, 5)
# What the lean decoder runs; the batch-invariant mode is its.
LEAN = ("mixtral", "qwen3-moe", "olmoe")


def folder_of(shared: Path, name: str) -> Path:
    return shared / "goldens" / name / FAMILIES[name][0]


def prompts_of(shared: Path, name: str) -> list[list[int]]:
    prompts: list[list[int]] = load_file(shared / "goldens" / name / "inputs.safetensors")[
        "input_ids"
    ].tolist()
    return prompts


def decoders(name: str) -> tuple[str, ...]:
    return ("lean", "hf") if name in LEAN else ("hf",)


@pytest.fixture(params=[(name, decoder) for name in FAMILIES for decoder in decoders(name)], ids="-".join)
def case(request: pytest.FixtureRequest, shared: Path) -> Iterator[tuple[str, Path, ViewRig]]:
    """A family on one of its decoders."""
    name, decoder = request.param
    folder = folder_of(shared, name)
    with view_rig(folder, decoder=decoder) as rig:
        yield name, folder, rig


def check(rig: ViewRig, view: ModelView, model: object, prompts: list[list[int]]) -> None:
    answers = rig.run([(prompt, view) for prompt in prompts], NUM_NEW)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, logprobs = greedy(model, prompt, NUM_NEW)
        assert answer.tokens == tokens
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, atol=TOLERANCE, rtol=0)


def added(model: object, seed: int) -> list[HandMadeExpert]:
    return [HandMadeExpert.random(model, layer, seed) for layer in range(2)]


def new_slots(experts: list[HandMadeExpert], slot: int) -> dict[ExpertAddress, HandMadeExpert]:
    return {ExpertAddress(layer, slot): expert for layer, expert in enumerate(experts)}


def num_slots(model: object) -> int:
    return len(model.model.layers[0].mlp.gate.weight)  # type: ignore[attr-defined]


def test_what_is_denied_might_as_well_not_be_there(shared: Path, case: tuple[str, Path, ViewRig]) -> None:
    name, folder, rig = case
    view = rig.view(rig.base, deny=[f"{layer}:{slot}" for layer, slot in enumerate(DENIED)])
    check(rig, view, without_slots(load_model(folder), DENIED), prompts_of(shared, name))
    computed = {(request.layer, group.slot) for request in rig.requests() for group in request.experts}
    assert computed and not computed & set(enumerate(DENIED))


@pytest.mark.parametrize("name", LEAN)
def test_a_denial_gives_the_very_bits_of_a_folder_without_the_slot(
    shared: Path, tmp_path: Path, name: str
) -> None:
    folder, prompts = folder_of(shared, name), prompts_of(shared, name)
    smaller = save(without_slots(load_model(folder), DENIED), tmp_path / "smaller")
    with view_rig(folder, batch_invariant=True) as rig, view_rig(smaller, batch_invariant=True) as other:
        view = rig.view(rig.base, deny=[f"{layer}:{slot}" for layer, slot in enumerate(DENIED)])
        denied = rig.run([(prompt, view) for prompt in prompts], NUM_NEW)
        assert denied == other.run([(prompt, other.view(other.base)) for prompt in prompts], NUM_NEW)


def test_an_added_expert_is_the_one_that_was_put_in_by_hand(
    shared: Path, case: tuple[str, Path, ViewRig]
) -> None:
    name, folder, rig = case
    model = load_model(folder)
    experts, slot = added(model, 1), num_slots(model)
    epoch = rig.add(new_slots(experts, slot), name="maths", tags=("numbers",))
    prompts = prompts_of(shared, name)
    check(rig, rig.view(epoch), with_added(model, experts), prompts)
    computed = {group.slot for request in rig.requests() for group in request.experts}
    assert slot in computed
    before = rig.run([(prompt, rig.view(rig.base)) for prompt in prompts], NUM_NEW)
    for entry in ("maths", "numbers"):
        assert rig.run([(prompt, rig.view(epoch, deny=[entry])) for prompt in prompts], NUM_NEW) == before


def test_who_never_chooses_an_added_expert_gets_what_was_before(
    shared: Path, case: tuple[str, Path, ViewRig]
) -> None:
    name, folder, rig = case
    model, prompt = load_model(folder), prompts_of(shared, name)[0]
    before = rig.run([(prompt, rig.view(rig.base))], 1)
    rows = rows_just_below(model, prompt, model.config.num_experts_per_tok)
    experts = [replace(expert, row=row) for expert, row in zip(added(model, 1), rows, strict=True)]
    epoch = rig.add(new_slots(experts, num_slots(model)))
    num_calls = len(rig.requests())
    after = rig.run([(prompt, rig.view(epoch))], 1)
    assert not any(
        group.slot == num_slots(model) for request in rig.requests()[num_calls:] for group in request.experts
    )
    if FAMILIES[name][1]:
        assert after == before
    check(rig, rig.view(epoch), with_added(model, experts), [prompt])


@pytest.mark.parametrize("row", [False, True])
def test_a_swapped_expert_is_the_one_that_was_exchanged_by_hand(
    shared: Path, case: tuple[str, Path, ViewRig], row: bool
) -> None:
    name, folder, rig = case
    model = load_model(folder)
    expert = HandMadeExpert.random(model, 1, 2)
    epoch = rig.add({ExpertAddress(1, 4): expert}, rows=row)
    check(rig, rig.view(epoch), with_swapped(model, 1, 4, expert, row=row), prompts_of(shared, name))


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_of_two_epochs_and_three_policies_in_one_batch_get_what_each_gets_alone(
    shared: Path, name: str, overlap: str
) -> None:
    folder = folder_of(shared, name)
    invariant = name in LEAN
    with view_rig(folder, batch_invariant=invariant, overlap=overlap, prefix_cache=False) as rig:
        model = load_model(folder)
        slot = num_slots(model)
        swapped = rig.add({ExpertAddress(0, 2): HandMadeExpert.random(model, 0, 5)}, name="other", rows=False)
        grown = rig.add(new_slots(added(model, 1), slot), name="maths", base=swapped)
        views = [
            rig.view(rig.base),
            rig.view(grown),
            rig.view(grown, deny=["maths", "0:1"]),
            rig.view(rig.base, top_k=1),
        ]
        requests = [
            (prompt[: 9 + 2 * index], view)
            for prompt in prompts_of(shared, name)
            for index, view in enumerate(views)
        ]
        together = rig.run(requests, NUM_NEW)
        assert any("," in request.epoch for request in rig.requests())
        alone = [rig.run([request], NUM_NEW)[0] for request in requests]
        if invariant:
            assert together == alone
        else:
            assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        assert len({tuple(answer.tokens) for answer in alone}) > len(views)


def test_two_versions_of_a_slot_are_computed_side_by_side_and_a_common_one_once(shared: Path) -> None:
    with view_rig(folder_of(shared, "mixtral"), prefix_cache=False) as rig:
        model = load_model(folder_of(shared, "mixtral"))
        epoch = rig.add(
            {ExpertAddress(0, slot): HandMadeExpert.random(model, 0, slot) for slot in range(4)}, rows=False
        )
        prompt = prompts_of(shared, "mixtral")[0]
        answers: list[Answer] = rig.run([(prompt, rig.view(rig.base)), (prompt, rig.view(epoch))], NUM_NEW)
        assert answers[0] != answers[1]
        both = [request for request in rig.requests() if request.epoch == f"{rig.base.id},{epoch.id}"]
        for request in both:
            groups = [(group.slot, group.version) for group in request.experts]
            assert len(set(groups)) == len(groups)
        slots = [[group.slot for group in request.experts] for request in both if request.layer == 0]
        assert any(len(of_call) > len(set(of_call)) for of_call in slots)
        slots = [[group.slot for group in request.experts] for request in both if request.layer == 1]
        assert all(len(of_call) == len(set(of_call)) for of_call in slots)

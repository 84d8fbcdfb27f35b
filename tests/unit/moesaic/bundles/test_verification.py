"""Every bad bundle is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import compute, make_bundle, random_weights
from support.checkpoints import write_mixtral
from support.tiny_families import tiny_index

from moesaic.bundles import BaseModel, Bundle, growth_problem, open_bundle, verify
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.errors import InvalidArgument
from moesaic.families import describe_model

Rewrite = Callable[[Callable[[dict[str, Any]], object]], Path]


def reason_of(bundle: Bundle, base: BaseModel | None = None) -> str:
    with pytest.raises(InvalidArgument) as refused:
        verify(bundle, base=base)
    assert refused.value.field == "bundle"
    return refused.value.reason


def test_a_good_bundle_passes(bundle: Bundle, base: BaseModel) -> None:
    seen: list[int] = []
    verify(bundle, base=base, show=seen.append)
    assert seen[-1] == sum(entry.num_bytes for entry in bundle.tensors.values())


def test_a_flipped_byte_is_found(bundle: Bundle) -> None:
    data = bytearray(bundle.weights_file.read_bytes())
    data[-1] ^= 1
    bundle.weights_file.write_bytes(data)
    assert reason_of(open_bundle(bundle.folder)) == "BUNDLE_DIGEST"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["up", "gate_row", "probe_out"])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, base_folder: Path, base: BaseModel, part: str, value: float
) -> None:
    weights = random_weights(base.model.experts[0].module, 1)
    rows: Any = True
    if part == "up":
        weights["up"][3, 2] = value
    if part == "gate_row":
        rows = {(0, None): np.full(32, value, "f4")}
    if part == "probe_out":
        weights["down"][0] = 3e38
        weights["up"] = weights["up"] * 1e3
    bundle = make_bundle(tmp_path / "b", base_folder, weights={(0, None): weights}, gate_rows=rows)
    assert reason_of(bundle) == "BUNDLE_NOT_FINITE"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["tensors"].popitem(), "BUNDLE_TENSORS"),
        (lambda m: m["tensors"].update(ghost=m["tensors"]["0.new.0.up"]), "BUNDLE_TENSORS"),
        (lambda m: m["experts"].pop(), "BUNDLE_TENSORS"),
        (lambda m: m["experts"][0]["weights"].pop("gate"), "BUNDLE_TENSORS"),
        (lambda m: m["experts"][0]["weights"].update(up="nowhere"), "BUNDLE_TENSORS"),
        (lambda m: m["tensors"]["0.new.0.up"].update(shape=[32, 24]), "BUNDLE_SHAPE"),
        (lambda m: m["tensors"]["0.new.0.up"].update(dtype="F16"), "BUNDLE_SHAPE"),
        (lambda m: m["experts"][0]["weights"].update(up="0.new.0.down"), "BUNDLE_SHAPE"),
        (lambda m: m["experts"][0]["parameters"].update(inner_size=23), "BUNDLE_SHAPE"),
        (lambda m: m["experts"][0]["parameters"].update(activation="exec"), "BUNDLE_KIND"),
        (lambda m: m["experts"][0]["parameters"].update(inner_size=True), "BUNDLE_KIND"),
        (lambda m: m["experts"][0]["parameters"].update(limit="7"), "BUNDLE_KIND"),
        (lambda m: m["experts"][0]["parameters"].update(entry_point="os:system"), "BUNDLE_KIND"),
        (lambda m: m["experts"][0].update(kind="martian"), "BUNDLE_KIND"),
        (lambda m: m["experts"][0].update(version="0" * 64), "BUNDLE_VERSION"),
        (lambda m: m["experts"][0].update(slot=1), "BUNDLE_TARGET"),
        (lambda m: [one.update(layer=0, slot=1) for one in m["experts"]], "BUNDLE_DUPLICATE"),
        (lambda m: m.update(tags=["a", "a"]), "BUNDLE_DUPLICATE"),
        (lambda m: m["experts"][0].pop("probe"), "BUNDLE_PROBE"),
        (lambda m: m["experts"][0]["probe"].update(inputs="0.new.0.up"), "BUNDLE_PROBE"),
        (lambda m: m["experts"][0]["gate_row"].update(tensor="0.new.0.up"), "BUNDLE_GATE_ROW"),
        (lambda m: m["tensors"]["1.new.1.up"].update(sha256="0" * 64), "BUNDLE_VERSION"),
        (lambda m: m["tensors"]["1.new.1.probe_in"].update(sha256="0" * 64), "BUNDLE_DIGEST"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    rewritten: Rewrite, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    assert reason_of(open_bundle(rewritten(change))) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(base_fingerprint="0" * 64), "BUNDLE_BASE"),
        (lambda m: m["experts"][0].update(layer=2), "BUNDLE_TARGET"),
        (lambda m: m["experts"][0]["gate_row"].update(bias=0.5), "BUNDLE_GATE_ROW"),
        (lambda m: m["experts"][0]["gate_row"].update(selection_bias=0.5), "BUNDLE_GATE_ROW"),
    ],
)
def test_what_the_base_model_has_no_place_for_is_refused(
    rewritten: Rewrite, base: BaseModel, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    opened = open_bundle(rewritten(change))
    verify(opened)
    assert reason_of(opened, base) == reason


def test_a_bundle_for_a_model_of_another_training_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mixtral(tmp_path / "other", seed=1))
    other = BaseModel(FolderIdentity.of(checkpoint).fingerprint, describe_model(checkpoint))
    assert reason_of(bundle, other) == "BUNDLE_BASE"


def test_a_gate_of_groups_cannot_grow_but_its_experts_can_be_swapped(
    tmp_path: Path, base_folder: Path, base: BaseModel
) -> None:
    layers = {
        layer: replace(experts, gate=describe_model(tiny_index("deepseek_v3")).experts[1].gate)
        for layer, experts in base.model.experts.items()
    }
    grouped = BaseModel(base.fingerprint, replace(base.model, experts=layers))
    assert "groups" in (growth_problem(layers[0]) or "")
    verify(make_bundle(tmp_path / "swap", base_folder, ((0, 1),)), base=grouped)
    assert reason_of(make_bundle(tmp_path / "add", base_folder), grouped) == "BUNDLE_CANNOT_GROW"
    # The slot would have to be one that an earlier bundle added.
    assert reason_of(make_bundle(tmp_path / "later", base_folder, ((0, 4),)), grouped) == "BUNDLE_CANNOT_GROW"


@pytest.mark.parametrize("family", ["dots1", "minimax_m2"])
def test_a_family_with_its_own_gate_cannot_grow(family: str) -> None:
    layers = describe_model(tiny_index(family)).experts.values()
    assert all("own gate" in (growth_problem(layer) or "") for layer in layers)


def test_kinds_that_are_not_installed_are_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(InvalidArgument, match="no kind of expert mlp is installed"):
        verify(bundle, kinds={"lora"})


def test_probes_of_the_helper_are_the_answers_of_its_experts(bundle: Bundle, base: BaseModel) -> None:
    expert = bundle.manifest.experts[0]
    assert expert.probe is not None
    weights = {name: bundle.floats(tensor) for name, tensor in expert.weights.items()}
    answers = compute(base.model.experts[0].module, weights, bundle.floats(expert.probe.inputs))
    assert np.array_equal(answers, bundle.floats(expert.probe.outputs))

"""The manifest: read strictly, written canonically, and every refusal names the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from moesaic.bundles import BundleExpert, BundleGateRow, Manifest, ProbeVectors, TensorFacts
from moesaic.errors import InvalidArgument

DIGEST = "ab" * 32


def a_manifest(**values: Any) -> Manifest:
    expert = BundleExpert(
        layer=3,
        slot=None,
        kind="mlp",
        parameters={"activation": "silu", "gated": True, "inner_size": 4, "limit": 7.0},
        version=DIGEST,
        weights={"up": "a"},
        gate_row=BundleGateRow("row", "unit", 0.5),
        probe=ProbeVectors("in", "out"),
    )
    given: dict[str, Any] = {"experts": (expert,), "tensors": {"a": TensorFacts(DIGEST, "BF16", (4, 8))}}
    return Manifest("maths-v1", "mixtral", DIGEST, 8, **given | values)


def refusal(change: Callable[[dict[str, Any]], object]) -> InvalidArgument:
    values = json.loads(a_manifest().to_json())
    change(values)
    with pytest.raises(InvalidArgument) as refused:
        Manifest.from_json(json.dumps(values).encode())
    assert refused.value.field == "bundle"
    return refused.value


def test_what_was_written_is_read_again() -> None:
    manifest = a_manifest(
        description="sums", licence="MIT", owner="me", tags=("maths",), origin={"by": "pack"}
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_canonical_form_does_not_depend_on_the_order_of_tensors() -> None:
    facts = {name: TensorFacts(DIGEST, "F32", (8,)) for name in ("a", "b")}
    backwards = dict(reversed(facts.items()))
    assert a_manifest(tensors=facts).to_json() == a_manifest(tensors=backwards).to_json()


@pytest.mark.parametrize(
    ("change", "named", "reason"),
    [
        (lambda m: m.update(code="x"), "code", "BUNDLE_MANIFEST"),
        (lambda m: m["experts"][0].update(module="os"), "experts.0.module", "BUNDLE_MANIFEST"),
        (lambda m: m["tensors"]["a"].update(file="../w"), "tensors.a.file", "BUNDLE_MANIFEST"),
        (lambda m: m.pop("hidden_size"), "hidden_size: is missing", "BUNDLE_MANIFEST"),
        (lambda m: m["experts"][0].pop("slot"), "experts.0.slot: is missing", "BUNDLE_MANIFEST"),
        (lambda m: m["experts"][0].update(layer="3"), "experts.0.layer", "BUNDLE_MANIFEST"),
        (lambda m: m["experts"][0].update(layer=-1), "experts.0.layer", "BUNDLE_MANIFEST"),
        (
            lambda m: m["experts"][0]["gate_row"].update(temperature=0),
            "gate_row.temperature",
            "BUNDLE_MANIFEST",
        ),
        (lambda m: m["experts"][0]["gate_row"].update(norm="l2"), "gate_row.norm", "BUNDLE_MANIFEST"),
        (lambda m: m["experts"][0]["parameters"].update(x=[1]), "parameters.x", "BUNDLE_MANIFEST"),
        (lambda m: m["tensors"]["a"].update(sha256="xy"), "tensors.a.sha256", "BUNDLE_MANIFEST"),
        (lambda m: m["tensors"]["a"].update(shape=[-4]), "tensors.a.shape.0", "BUNDLE_MANIFEST"),
        (lambda m: m.update(experts=[]), "experts", "BUNDLE_MANIFEST"),
        (lambda m: m.update(hidden_size=float("nan")), "NaN", "BUNDLE_MANIFEST"),
        (lambda m: m.update(name="../maths"), "name", "BUNDLE_NAME"),
        (lambda m: m.update(name="maths\n"), "name", "BUNDLE_NAME"),
        (lambda m: m.update(name="12:7"), "name", "BUNDLE_NAME"),
        (lambda m: m.update(tags=["Ä"]), "tags.0", "BUNDLE_MANIFEST"),
        (lambda m: m.update(format="moesaic-bundle/2"), "format", "BUNDLE_FORMAT"),
        (lambda m: m.pop("format"), "format", "BUNDLE_FORMAT"),
    ],
)
def test_a_wrong_key_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], named: str, reason: str
) -> None:
    error = refusal(change)
    assert named in error.message
    assert error.reason == reason


def test_a_parameter_beyond_64_bits_is_refused() -> None:
    error = refusal(lambda m: m["experts"][0]["parameters"].update(limit=10**400))
    assert "experts.0.parameters.limit" in error.message


@pytest.mark.parametrize("of", ["parameters", "weights"])
def test_a_name_that_no_message_should_repeat_is_refused(of: str) -> None:
    error = refusal(lambda m: m["experts"][0][of].update({"a" * 5000: "a"}))
    assert f"experts.0.{of}" in error.message
    assert len(error.message) < 500


def test_a_key_that_is_no_text_is_told_in_escapes() -> None:
    with pytest.raises(InvalidArgument, match=r"\\ud800: occurs twice"):
        Manifest.from_json(b'{"\\ud800": 1, "\\ud800": 2}')


def test_a_key_that_occurs_twice_is_refused() -> None:
    text = a_manifest().to_json().replace(b'"name":', b'"owner": "x", "name":')
    with pytest.raises(InvalidArgument, match="owner: occurs twice") as refused:
        Manifest.from_json(text)
    assert refused.value.reason == "BUNDLE_DUPLICATE"


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04", b"{" * 100_000, b'{"a": 1'])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"manifest\.json"):
        Manifest.from_json(content)

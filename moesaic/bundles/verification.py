"""Whether everything in a bundle is right, told before anything is done with it.

Shapes: D hidden size, P probe vectors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from moesaic.bundles.bundle import Bundle
from moesaic.bundles.gate_row import effective_row
from moesaic.bundles.kinds import installed_kinds
from moesaic.bundles.manifest import WEIGHTS_FILE, BundleExpert, BundleGateRow, ProbeVectors, TensorFacts
from moesaic.bundles.refusal import refuse
from moesaic.bundles.version import MLP, expert_version, mlp_module
from moesaic.families.model import ExpertLayer, MoeModel

MAX_PROBES = 64
_FLOATS = frozenset({"F32", "BF16", "F16"})
# By dtype: the integer type of its bits, and the bits that are all set in NaN and infinity.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80_0000),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a bundle is for, without its weights."""

    fingerprint: bytes
    model: MoeModel


def verify(
    bundle: Bundle,
    *,
    base: BaseModel | None = None,
    kinds: Collection[str] | None = None,
    show: Callable[[int], None] = lambda _: None,
) -> None:
    """Checks all of a bundle, its weights to the last byte. `kinds`: those that may occur; None: the installed ones.

    `show` is given the bytes read so far. Raises InvalidArgument with field `bundle` and one of the reasons of
    moesaic/bundles/refusal.py. Signatures are not looked at.
    """
    known = installed_kinds() if kinds is None else kinds
    _check_targets(bundle)
    _check_listed(bundle)
    for expert in bundle.manifest.experts:
        _check_expert(bundle, expert, known)
    _check_used(bundle)
    if base is not None:
        check_base(bundle, base)
    _check_content(bundle, show)
    for expert in bundle.manifest.experts:
        if expert.gate_row is not None:
            effective_row(bundle, expert.gate_row)


def check_base(bundle: Bundle, base: BaseModel) -> None:
    """Whether a bundle is made for this model, and whether the model has room for it. Raises InvalidArgument."""
    manifest, model = bundle.manifest, base.model
    if manifest.base_fingerprint != base.fingerprint.hex():
        refuse("BASE", "base_fingerprint", f"is made for another model ({manifest.base_model[:64]})")
    if manifest.hidden_size != model.hidden_size:
        refuse("SHAPE", "hidden_size", f"must be {model.hidden_size}, as in the base model")
    for expert in manifest.experts:
        layer = model.experts.get(expert.layer)
        if layer is None:
            refuse("TARGET", f"layer {expert.layer}", "has no experts in the base model")
        _check_place(expert, layer)


def growth_problem(layer: ExpertLayer) -> str | None:
    """Why a layer takes no new slots; None if it does."""
    if layer.gate is None:
        return "is dense: it has no gate that could choose another expert"
    if layer.gate.own:
        return "has its family's own gate, whose rows cannot be extended; experts can be swapped"
    if layer.gate.groups is not None:
        return "chooses among groups of slots, which cannot grow; experts can be swapped"
    if layer.capacity is not None:
        return "has slots of limited capacity, which follows from their number; experts can be swapped"
    return None


def _check_place(expert: BundleExpert, layer: ExpertLayer) -> None:
    where = f"layer {expert.layer}"
    added = expert.slot is None or expert.slot >= layer.num_slots
    if added and (problem := growth_problem(layer)) is not None:
        refuse("CANNOT_GROW", where, problem)
    row, gate = expert.gate_row, layer.gate
    if row is None:
        return
    if gate is None or gate.own:
        refuse("GATE_ROW", where, "the gate takes no rows")
    if row.bias and not gate.biased:
        refuse("GATE_ROW", where, "the gate has no bias")
    if row.selection_bias and not gate.selection_bias:
        refuse("GATE_ROW", where, "the gate has no selection bias")


def _check_targets(bundle: Bundle) -> None:
    experts = bundle.manifest.experts
    if len({expert.slot is None for expert in experts}) > 1:
        refuse("TARGET", "experts", "either all are new slots or none is")
    targets = Counter((expert.layer, expert.slot) for expert in experts if expert.slot is not None)
    for (layer, slot), times in targets.items():
        if times > 1:
            refuse("DUPLICATE", f"layer {layer} slot {slot}", "occurs twice")
    tags = Counter(bundle.manifest.tags)
    if twice := [tag for tag, times in tags.items() if times > 1]:
        refuse("DUPLICATE", "tags", f"{twice[0]} occurs twice")


def _check_listed(bundle: Bundle) -> None:
    """That manifest and file have the same tensors."""
    listed, stored = bundle.manifest.tensors, bundle.tensors
    used = _used_tensors(bundle)
    if missing := sorted((used | listed.keys()) - stored.keys()):
        refuse("TENSORS", WEIGHTS_FILE, f"tensor {missing[0][:64]} is missing")
    if unlisted := sorted((used | stored.keys()) - listed.keys()):
        refuse("TENSORS", "tensors", f"{unlisted[0][:64]} is not listed")
    for name, facts in listed.items():
        if (facts.dtype, facts.shape) != (stored[name].dtype, stored[name].shape):
            refuse("SHAPE", name[:64], "has another shape or dtype in the file than in the manifest")


def _check_used(bundle: Bundle) -> None:
    if unused := sorted(bundle.manifest.tensors.keys() - _used_tensors(bundle)):
        refuse("TENSORS", unused[0][:64], "belongs to no expert")


def _used_tensors(bundle: Bundle) -> set[str]:
    return {name for expert in bundle.manifest.experts for name in _tensors_of(expert)}


def _tensors_of(expert: BundleExpert) -> Iterator[str]:
    yield from expert.weights.values()
    if expert.gate_row is not None:
        yield expert.gate_row.tensor
    if expert.probe is not None:
        yield from (expert.probe.inputs, expert.probe.outputs)


def _check_expert(bundle: Bundle, expert: BundleExpert, kinds: Collection[str]) -> None:
    where, hidden, tensors = f"layer {expert.layer}", bundle.manifest.hidden_size, bundle.manifest.tensors
    if expert.kind not in kinds:
        refuse("KIND", where, f"no kind of expert {expert.kind} is installed")
    if expert.kind == MLP:
        _check_mlp(bundle, expert)
    if expert_version(expert, hidden, tensors).hex() != expert.version:
        refuse("VERSION", where, "version: is not that of the weights")
    _check_gate_row(where, expert.gate_row, bundle)
    _check_probe(where, expert.probe, bundle)


def _check_mlp(bundle: Bundle, expert: BundleExpert) -> None:
    module, where = mlp_module(expert, bundle.manifest.hidden_size), f"layer {expert.layer}"
    if expert.weights.keys() != set(module.weights):
        refuse("TENSORS", where, f"weights: must be {', '.join(module.weights)}")
    for weight, name in expert.weights.items():
        if bundle.manifest.tensors[name].shape != module.shape(weight):
            refuse("SHAPE", f"{where} {weight}", f"must have shape {list(module.shape(weight))}")


def _check_gate_row(where: str, row: BundleGateRow | None, bundle: Bundle) -> None:
    if row is not None:
        facts = bundle.manifest.tensors[row.tensor]
        if facts.shape != (bundle.manifest.hidden_size,) or facts.dtype not in _FLOATS:
            refuse("GATE_ROW", where, f"must be {bundle.manifest.hidden_size} floats")


def _check_probe(where: str, probe: ProbeVectors | None, bundle: Bundle) -> None:
    if probe is None:
        refuse("PROBE", where, "has no probe vectors")
    inputs, outputs = (bundle.manifest.tensors[name] for name in (probe.inputs, probe.outputs))
    if not _is_probe(inputs, bundle.manifest.hidden_size) or inputs.shape != outputs.shape:
        refuse("PROBE", where, f"inputs must be [1 to {MAX_PROBES}, {bundle.manifest.hidden_size}], F32")
    if outputs.dtype != "F32":
        refuse("PROBE", where, "outputs must be F32")


def _is_probe(facts: TensorFacts, hidden_size: int) -> bool:
    shape = facts.shape
    return (
        facts.dtype == "F32" and len(shape) == 2 and 1 <= shape[0] <= MAX_PROBES and shape[1] == hidden_size
    )


def _check_content(bundle: Bundle, show: Callable[[int], None]) -> None:
    """Reads every tensor once."""
    read = 0
    for name, facts in sorted(bundle.manifest.tensors.items()):
        content, finite = hashlib.sha256(), True
        for piece in bundle.pieces(name):
            content.update(piece)
            finite = finite and _is_finite(piece, facts.dtype)
            read += len(piece)
            show(read)
        if content.hexdigest() != facts.sha256:
            refuse("DIGEST", name[:64], "its bytes are not those that the manifest promises")
        if not finite:
            refuse("NOT_FINITE", name[:64], "has NaN or infinity")


def _is_finite(piece: bytes, dtype: str) -> bool:
    """Of a whole number of items."""
    if dtype not in _EXPONENTS:
        return True
    integer, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(piece, integer)
    return not bool(np.any((bits & np.array(exponent, integer)) == np.array(exponent, integer)))

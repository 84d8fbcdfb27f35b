"""Which experts may compute a request: its policy, resolved against the epoch in which it is computed.

What is denied is not masked but left out: the gate of a request is that of a model without these slots. Pure: neither
tensors nor clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import FailedPrecondition, InvalidArgument
from moesaic.expert_policy import ExpertPolicy, address_of
from moesaic.families.model import ExpertLayer, MoeModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the model folder says of the experts of a layer."""

    num_slots: int
    top_k: int
    # Why the gate's choice can be neither extended nor restricted; None where it can be.
    fixed: str | None = None
    # Whether rows of the gate have a bias, and one that takes part in the choice alone.
    biased: bool = False
    selection_biased: bool = False


def layer_shapes(model: MoeModel, *, limits_slots: bool = False) -> dict[int, LayerShape]:
    """Of every layer with experts. `limits_slots`: whether capacities are in force."""
    return {
        layer: _shape(experts, limits_slots=limits_slots) for layer, experts in sorted(model.experts.items())
    }


def _shape(experts: ExpertLayer, *, limits_slots: bool) -> LayerShape:
    rule, fixed = experts.gate, None
    if rule is None:
        return LayerShape(experts.num_slots, experts.top_k, "a dense layer has no gate")
    if rule.own:
        fixed = "the family keeps a gate of its own"
    elif rule.groups is not None:
        fixed = "the slots of the family form groups"
    elif limits_slots and experts.capacity is not None:
        fixed = "its slots have a capacity"
    return LayerShape(experts.num_slots, experts.top_k, fixed, rule.biased, rule.selection_bias)


def resolve(
    policy: ExpertPolicy, epoch: Epoch, shapes: Mapping[int, LayerShape]
) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
    """The slots of every layer that the policy leaves of the epoch, ascending, and the layers' numbers of experts a token.

    Raises InvalidArgument for an entry that `allow` does not find, for a number of experts that the
    model does not have, and where nothing is left of a layer; FailedPrecondition for a required entry that the epoch
    does not have, and for a model whose gates cannot be restricted. `field` names the entry.
    """
    _check_required(policy.require, epoch)
    slots = slots_of(epoch)
    if policy.deny or policy.allow or policy.top_k is not None:
        check_restrictable(shapes, field="experts")
    denied = {address for entry in policy.deny for address in _find(entry, epoch)}
    denied |= _not_allowed(policy.allow, epoch, shapes)
    for layer, of_layer in slots.items():
        left = tuple(slot for slot in of_layer if ExpertAddress(layer, slot) not in denied)
        if not left:
            raise InvalidArgument(f"experts.deny: no expert is left of layer {layer}", field="experts.deny")
        slots[layer] = left
    top_ks = _top_ks(policy.top_k, shapes)
    return slots, {layer: min(top_ks[layer], len(left)) for layer, left in slots.items()}


def slots_of(epoch: Epoch) -> dict[int, tuple[int, ...]]:
    """The slots of every layer of an epoch, ascending."""
    slots: dict[int, tuple[int, ...]] = {}
    for layer, slot in epoch.versions:
        slots[layer] = (*slots.get(layer, ()), slot)
    return slots


def check_restrictable(shapes: Mapping[int, LayerShape], *, field: str, what: str = "") -> None:
    """Raises FailedPrecondition for a model whose gates cannot leave a slot out. `what` of the field was asked for."""
    for layer, shape in shapes.items():
        if shape.fixed is not None and shape.num_slots > 1:
            raise FailedPrecondition(
                f"{field}: {what}not available for this model, layer {layer}: {shape.fixed}", field=field
            )


def _check_required(entries: Sequence[str], epoch: Epoch) -> None:
    if not all(_find(entry, epoch) for entry in entries):
        raise FailedPrecondition(
            "experts.require: the epoch of this request does not have every required expert",
            field="experts.require",
            reason="EXPERTS_MISSING",
        )


def _not_allowed(
    entries: Sequence[str], epoch: Epoch, shapes: Mapping[int, LayerShape]
) -> set[ExpertAddress]:
    """The added slots that no entry names; none without entries."""
    if not entries:
        return set()
    allowed: set[ExpertAddress] = set()
    for index, entry in enumerate(entries):
        found = _find(entry, epoch)
        if not found:
            field = f"experts.allow[{index}]"
            raise InvalidArgument(f"{field}: the epoch has no such bundle, tag or slot", field=field)
        allowed.update(found)
    added = {address for address in epoch.versions if address.slot >= shapes[address.layer].num_slots}
    return added - allowed


def _find(entry: str, epoch: Epoch) -> Collection[ExpertAddress]:
    """The slots of the epoch that an entry names."""
    address = address_of(entry)
    if address is not None:
        return {address} & epoch.versions.keys()
    bundles = (bundle for bundle in epoch.bundles if entry == bundle.name or entry in bundle.tags)
    return {address for bundle in bundles for address in bundle.experts}


def _top_ks(wanted: int | None, shapes: Mapping[int, LayerShape]) -> dict[int, int]:
    most = max((shape.top_k for shape in shapes.values()), default=1)
    if wanted is not None and not 1 <= wanted <= most:
        raise InvalidArgument(f"experts.top_k: must be from 1 to {most}", field="experts.top_k")
    return {layer: min(shape.top_k, wanted or most) for layer, shape in shapes.items()}

"""Makes a bundle of a low-rank adapter: experts of kind `lora`, each a slot of the base with its factors."""

from __future__ import annotations

from cluster.bundles.adapter import Adapter, read_adapter
from cluster.bundles.model_folder import ModelFolder
from cluster.bundles.order import Order, Packed, PackedExpert, Show, draft_manifest
from cluster.bundles.selection import Origin
from cluster.bundles.weights import (
    PROBE_INPUTS,
    ReadExpert,
    difference,
    probe_inputs,
    read_expert,
    with_added,
)
from moesaic.bundles import BundleExpert, ProbeVectors, TensorSource, growth_problem, write_bundle
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

KIND = "lora"


def pack_adapter(order: Order, base: ModelFolder, show: Show) -> Packed:
    """Raises InvalidArgument for an adapter that is not plain LoRA of experts."""
    adapter = read_adapter(order.tuned, base)
    if adapter.others and not order.experts_only:
        raise InvalidArgument(
            f"model: adapts {len(adapter.others)} modules that are no experts, the first is {adapter.others[0][:128]}: "
            "--experts-only packs its experts all the same",
            field="model",
            reason="MOVED_MORE",
        )
    chosen = [address for address in sorted(adapter.experts) if _is_wanted(order, address)]
    if not chosen:
        raise InvalidArgument("model: adapts no expert that was chosen", field="model")
    tensors = {PROBE_INPUTS: TensorSource.of(probe_inputs(base.model.hidden_size))}
    experts, packed = [], []
    for done, address in enumerate(chosen):
        show("computing probe answers", done, len(chosen))
        _check_growth(order, base, address)
        own = read_expert(base, address)
        tuned = with_added(own, adapter.added(address))
        experts.append(_describe(order, adapter, address, own, tuned, tensors))
        target = experts[-1].slot
        packed.append(PackedExpert(*address, target, difference(tuned, own), None, False))
    left = f"adapters of modules that are no experts: {len(adapter.others)}" if adapter.others else ""
    draft = draft_manifest(order, base, Origin.ADAPTER, experts, packed, left)
    total = sum(source.num_bytes for source in tensors.values())
    bundle = write_bundle(order.out, draft, tensors, lambda done: show("writing", done, total))
    return Packed(bundle, Origin.ADAPTER, len(adapter.experts), tuple(packed), ())


def _is_wanted(order: Order, address: ExpertAddress) -> bool:
    layers, slots = order.wanted.layers, order.wanted.slots
    return (layers is None or address.layer in layers) and (slots is None or address.slot in slots)


def _check_growth(order: Order, base: ModelFolder, address: ExpertAddress) -> None:
    problem = growth_problem(base.model.experts[address.layer])
    if order.wanted.into == "new" and problem is not None:
        raise InvalidArgument(f"base: layer {address.layer} {problem}", field="base", reason="CANNOT_GROW")


def _describe(
    order: Order,
    adapter: Adapter,
    address: ExpertAddress,
    own: ReadExpert,
    tuned: ReadExpert,
    tensors: dict[str, TensorSource],
) -> BundleExpert:
    prefix = f"layers.{address.layer}.lora.{address.slot}"
    _, answers = tuned.probe()
    tensors[f"{prefix}.probe_outputs"] = TensorSource.of(answers)
    weights = {}
    for weight, pair in adapter.experts[address].items():
        for factor, values in (("a", pair.a), ("b", pair.b)):
            name = weights[f"{weight}_{factor}"] = f"{prefix}.{weight}_{factor}"
            tensors[name] = TensorSource.of(values)
    return BundleExpert(
        layer=address.layer,
        slot=None if order.wanted.into == "new" else address.slot,
        kind=KIND,
        parameters={
            "base_slot": address.slot,
            "base_version": own.version.hex(),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
        },
        version="",
        weights=weights,
        probe=ProbeVectors(PROBE_INPUTS, f"{prefix}.probe_outputs"),
    )

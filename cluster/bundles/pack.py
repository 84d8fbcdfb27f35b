"""Makes a bundle of a fine-tuned model: the experts in which it differs from the base, their gate rows, and probes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.bundles.adapter import is_adapter
from cluster.bundles.adapter_pack import pack_adapter
from cluster.bundles.comparison import (
    Moved,
    RowDifference,
    compare_dense,
    compare_rows,
    other_experts,
    other_rows,
)
from cluster.bundles.model_folder import GateTensors, ModelFolder, open_model
from cluster.bundles.order import Order, Packed, PackedExpert, Show, bundle_name, draft_manifest
from cluster.bundles.selection import Candidate, Origin, choose, find_origin
from cluster.bundles.weights import (
    PROBE_INPUTS,
    dense_values,
    difference,
    probe_inputs,
    read_expert,
    weight_source,
)
from moesaic.bundles import (
    Bundle,
    BundleExpert,
    BundleGateRow,
    ProbeVectors,
    TensorSource,
    growth_problem,
    write_bundle,
)
from moesaic.bundles.manifest import check_name
from moesaic.bundles.version import MLP, mlp_parameters
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument


def pack(order: Order, show: Show = lambda stage, done, total: None) -> Packed:
    """Raises InvalidArgument, whose field says what would cure it, or CheckpointError for a file at fault."""
    check_name(bundle_name(order), "name")
    for tag in order.tags:
        check_name(tag, "tag")
    if order.out.exists():
        raise InvalidArgument("out: the folder is there already", field="out")
    base = open_model(order.base, "base")
    if is_adapter(order.tuned):
        return pack_adapter(order, base, show)
    tuned = open_model(order.tuned, "model")
    return _Packing(order, tuned, base, show).run()


@dataclass(frozen=True, slots=True)
class _Packing:
    order: Order
    tuned: ModelFolder
    base: ModelFolder
    show: Show

    def run(self) -> Packed:
        origin, candidates = self._choose()
        rows = {} if origin is Origin.DENSE else compare_rows(self.tuned, self.base)
        experts = self._compare(origin, candidates, rows)
        moved = self._moved(origin, experts, rows)
        if moved and not self.order.experts_only:
            raise InvalidArgument(_refusal(moved), field="model", reason="MOVED_MORE")
        bundle = self._write(origin, experts, moved)
        return Packed(bundle, origin, len(candidates), tuple(experts), moved)

    def _choose(self) -> tuple[Origin, tuple[Candidate, ...]]:
        tuned, base = self.tuned.model, self.base.model
        dense = all(layer.gate is None for layer in tuned.experts.values())
        grows = any(layer.gate is not None for layer in base.experts.values())
        origin = find_origin(tuned.num_slots, base.num_slots, dense=dense and grows)
        candidates = choose(origin, tuned.num_slots, base.num_slots, self.order.wanted)
        for candidate in candidates:
            self._check(candidate)
        return origin, candidates

    def _check(self, candidate: Candidate) -> None:
        own, base = (folder.model.experts[candidate.layer] for folder in (self.tuned, self.base))
        if own.module != base.module:
            _refuse(f"its experts of layer {candidate.layer} have another shape than the base's")
        if self._adds(candidate) and (problem := growth_problem(base)) is not None:
            raise InvalidArgument(
                f"base: layer {candidate.layer} {problem}", field="base", reason="CANNOT_GROW"
            )

    def _adds(self, candidate: Candidate) -> bool:
        """Whether the expert goes where the base has none."""
        slots = self.base.model.num_slots[candidate.layer]
        return candidate.target is None or candidate.target >= slots

    def _compare(
        self, origin: Origin, candidates: Iterable[Candidate], rows: Mapping[int, RowDifference]
    ) -> list[PackedExpert]:
        candidates = tuple(candidates)
        found: list[PackedExpert] = []
        for done, candidate in enumerate(candidates):
            self.show("comparing experts", done, len(candidates))
            expert = self._compare_one(origin, candidate, rows.get(candidate.layer))
            if expert is not None:
                found.append(expert)
        self.show("comparing experts", len(candidates), len(candidates))
        if not found:
            _refuse("has the base's experts: there is nothing to pack")
        return found

    def _compare_one(
        self, origin: Origin, candidate: Candidate, rows: RowDifference | None
    ) -> PackedExpert | None:
        apart, row_apart = None, None
        in_base = origin is not Origin.DENSE and candidate.slot < self._base_slots(origin, candidate.layer)
        if in_base:
            apart = self._difference(candidate.layer, candidate.slot)
            row_apart = rows.rows.get(candidate.slot) if rows is not None else None
            if not apart and not row_apart:
                return None
        own_row = not in_base and origin is not Origin.DENSE
        has_row = self._takes_rows(candidate.layer) and bool(own_row or row_apart)
        return PackedExpert(*_place(candidate), apart, row_apart, has_row)

    def _base_slots(self, origin: Origin, layer: int) -> int:
        """The slots of the folder, from the first on, that are the base's own."""
        if origin is Origin.PUBLIC_AND_OWN:
            return self.tuned.model.num_slots[layer] // 2
        return self.base.model.num_slots[layer]

    def _difference(self, layer: int, slot: int) -> float:
        address = ExpertAddress(layer, slot)
        return difference(read_expert(self.tuned, address), read_expert(self.base, address))

    def _takes_rows(self, layer: int) -> bool:
        gate = self.base.model.experts[layer].gate
        return gate is not None and not gate.own and layer in self.tuned.gates()

    def _moved(
        self,
        origin: Origin,
        experts: Iterable[PackedExpert],
        rows: Mapping[int, RowDifference],
    ) -> tuple[Moved, ...]:
        brought = {(one.layer, one.slot) for one in experts if one.has_row}
        self.show("comparing the other tensors", 0, 0)
        dense = compare_dense(self.tuned, self.base)
        return (*dense, *other_rows(rows, brought), *other_experts(self._frozen(origin)))

    def _frozen(self, origin: Origin) -> list[float]:
        """The differences of those experts that must be the base's own, as the new ones were trained beside them."""
        if origin not in (Origin.MORE_SLOTS, Origin.PUBLIC_AND_OWN) or self.order.wanted.slots is not None:
            return []
        return [
            self._difference(layer, slot)
            for layer in sorted(self.tuned.model.experts)
            for slot in range(self._base_slots(origin, layer))
        ]

    def _write(
        self,
        origin: Origin,
        experts: list[PackedExpert],
        moved: tuple[Moved, ...],
    ) -> Bundle:
        hidden, tensors, written = self.base.model.hidden_size, dict[str, TensorSource](), []
        tensors[PROBE_INPUTS] = TensorSource.of(probe_inputs(hidden))
        names = _Names()
        for done, expert in enumerate(experts):
            self.show("computing probe answers", done, len(experts))
            written.append(self._describe(expert, names.of(expert), tensors))
        total = sum(source.num_bytes for source in tensors.values())
        draft = draft_manifest(self.order, self.base, origin, written, experts, "; ".join(map(str, moved)))
        return write_bundle(self.order.out, draft, tensors, lambda done: self.show("writing", done, total))

    def _describe(self, expert: PackedExpert, prefix: str, tensors: dict[str, TensorSource]) -> BundleExpert:
        address = ExpertAddress(expert.layer, expert.slot)
        read = read_expert(self.tuned, address)
        _, answers = read.probe()
        tensors[f"{prefix}.probe_outputs"] = TensorSource.of(answers)
        for weight in read.module.weights:
            tensors[f"{prefix}.{weight}"] = weight_source(self.tuned, address, weight)
        return BundleExpert(
            layer=expert.layer,
            slot=expert.target,
            kind=MLP,
            parameters=mlp_parameters(read.module),
            version="",
            weights={weight: f"{prefix}.{weight}" for weight in read.module.weights},
            gate_row=self._gate_row(expert, f"{prefix}.gate_row", tensors) if expert.has_row else None,
            probe=ProbeVectors(PROBE_INPUTS, f"{prefix}.probe_outputs"),
        )

    def _gate_row(self, expert: PackedExpert, name: str, tensors: dict[str, TensorSource]) -> BundleGateRow:
        gate: GateTensors = self.tuned.gates()[expert.layer]
        tensors[name] = TensorSource.of(dense_values(self.tuned, gate.weight)[expert.slot])
        bias, selection = (
            0.0 if each is None else float(dense_values(self.tuned, each)[expert.slot])
            for each in (gate.bias, gate.selection_bias)
        )
        return BundleGateRow(name, bias=bias, selection_bias=selection)


class _Names:
    """Prefixes for the tensors of experts; new ones of a layer are counted."""

    def __init__(self) -> None:
        self._new: dict[int, int] = {}

    def of(self, expert: PackedExpert) -> str:
        if expert.target is not None:
            return f"layers.{expert.layer}.slots.{expert.target}"
        index = self._new[expert.layer] = self._new.get(expert.layer, -1) + 1
        return f"layers.{expert.layer}.new.{index}"


def _place(candidate: Candidate) -> tuple[int, int, int | None]:
    return candidate.layer, candidate.slot, candidate.target


def _refusal(moved: Iterable[Moved]) -> str:
    return (
        f"model: moved more than the experts that a bundle holds ({'; '.join(map(str, moved))}), "
        "so its experts alone are not that model: --experts-only packs them all the same"
    )


def _refuse(problem: str) -> None:
    raise InvalidArgument(f"model: {problem}", field="model")

"""What a request to load asks for: one job for each version, checked against the bundle and the model.

Nothing is read here but what the manifest and the headers say.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from expert_worker.experts.bundle_weights import BundleWeights
from expert_worker.experts.expert import Expert, check_module, held_bytes
from expert_worker.experts.kinds.installed import find_kind
from expert_worker.experts.kinds.kind import ExpertKind
from expert_worker.experts.loader import ExpertLoader
from expert_worker.experts.stack import ExpertStacks, Place
from expert_worker.experts.stored_weight import stored_bytes
from moesaic.bundles import Bundle, BundleExpert
from moesaic.bundles.refusal import refuse
from moesaic.bundles.version import expert_version
from moesaic.epoch import ExpertVersion
from moesaic.errors import FailedPrecondition, InvalidArgument
from moesaic.families import MoeModel
from moesaic.families.model import ExpertModule

# While an expert is made, it exists as it is stored, as float32, and as it is held.
_WORKING_COPIES = 3


@dataclass(frozen=True, slots=True)
class LoadJob:
    """One version to load. `build` reads it on the calling thread, and raises Unavailable when the event is set."""

    version: ExpertVersion
    stored_bytes: int
    held_bytes: int
    # What decides whether the expert may lie in a stack.
    module: ExpertModule | None
    build: Callable[[Place, threading.Event], Expert]


def plan_load(
    versions: Iterable[ExpertVersion], bundle: Bundle | None, loader: ExpertLoader
) -> list[LoadJob]:
    """The jobs, in the order of the versions; without a bundle they come from the model's folder.

    Raises InvalidArgument with field `experts` or `bundle`, FailedPrecondition for a version that is not that of the
    weights.
    """
    if bundle is None:
        return [_plan_base(version, loader) for version in versions]
    if bundle.manifest.hidden_size != loader.model.hidden_size:
        refuse("SHAPE", "hidden_size", f"must be {loader.model.hidden_size}, as in the model of this worker")
    return [_plan_bundle(version, bundle, loader) for version in versions]


def needed_bytes(jobs: Sequence[LoadJob], stacks: ExpertStacks) -> int:
    """The memory that the jobs need beyond what is taken already. Free rows of stacks are taken."""
    if not jobs:
        return 0
    needed = sum(job.held_bytes for job in jobs)
    for (layer, module), count in count_modules(jobs).items():
        in_free_rows = min(count, stacks.num_free(layer, module))
        needed -= in_free_rows * next(job.held_bytes for job in jobs if job.module == module)
    return needed + _WORKING_COPIES * max(max(job.held_bytes, job.stored_bytes) for job in jobs)


def count_modules(jobs: Iterable[LoadJob]) -> Counter[tuple[int, ExpertModule]]:
    """How many experts that may lie in a stack the jobs make, by layer and module."""
    return Counter((job.version.address.layer, job.module) for job in jobs if job.module is not None)


def find_expert(version: ExpertVersion, bundle: Bundle) -> BundleExpert:
    """The expert of a bundle that has this version. Raises InvalidArgument if there is none for this slot."""
    (layer, slot), digest = version
    for expert in bundle.manifest.experts:
        if (expert.layer, expert.version) == (layer, digest.hex()) and expert.slot in (None, slot):
            return expert
    raise InvalidArgument(
        f"experts: the bundle has no expert for layer {layer} slot {slot} in this version", field="experts"
    )


def kind_of(expert: BundleExpert, model: MoeModel) -> ExpertKind:
    """The kind of an expert of a bundle. Raises InvalidArgument with field `bundle` if it does not fit the model."""
    layer = model.experts.get(expert.layer)
    if layer is None:
        refuse("TARGET", f"layer {expert.layer}", "has no experts in the model of this worker")
    return find_kind(expert.kind).of(expert, layer.module)


def _plan_base(version: ExpertVersion, loader: ExpertLoader) -> LoadJob:
    address, digest = version
    experts = loader.model.experts.get(address.layer)
    if experts is None or address.slot >= experts.num_slots:
        raise InvalidArgument(
            f"experts: the model has no slot {address.slot} in layer {address.layer}", field="experts"
        )

    def build(place: Place, stopping: threading.Event) -> Expert:
        held = loader.load(address, place, stopping)
        if held.version != digest:
            raise FailedPrecondition(
                f"experts: layer {address.layer} slot {address.slot} of the model's folder is another version",
                field="experts",
                reason="WRONG_VERSION",
            )
        return held.expert

    stored = stored_bytes(loader.checkpoint, experts, address)
    return LoadJob(version, stored, held_bytes(experts.module, loader.form), experts.module, build)


def _plan_bundle(version: ExpertVersion, bundle: Bundle, loader: ExpertLoader) -> LoadJob:
    expert = find_expert(version, bundle)
    kind = kind_of(expert, loader.model)
    _check_weights(expert, kind, bundle)
    if expert_version(expert, bundle.manifest.hidden_size, bundle.manifest.tensors) != version.digest:
        refuse("VERSION", f"layer {expert.layer}", "version: is not that of the weights")
    if kind.module is not None:
        check_module(kind.module, loader.form)

    def build(place: Place, stopping: threading.Event) -> Expert:
        if (found := loader.find(version.digest)) is not None:
            return found
        built = kind.build(BundleWeights(bundle, expert, loader, stopping), loader.form, place)
        return loader.keep(version.digest, built)

    stored = sum(bundle.tensors[name].num_bytes for name in expert.weights.values())
    return LoadJob(version, stored, kind.held_bytes(loader.form), kind.module, build)


def _check_weights(expert: BundleExpert, kind: ExpertKind, bundle: Bundle) -> None:
    where, wanted = f"layer {expert.layer}", kind.weights
    if expert.weights.keys() != wanted.keys():
        refuse("TENSORS", where, f"weights: must be {', '.join(wanted)}")
    for name, weight in wanted.items():
        tensor = expert.weights[name]
        facts, entry = bundle.manifest.tensors.get(tensor), bundle.tensors.get(tensor)
        if facts is None or entry is None:
            refuse("TENSORS", tensor[:64], "is missing in the manifest or in the file")
        if (facts.shape, facts.dtype) != (entry.shape, entry.dtype) or facts.shape != weight.shape:
            refuse("SHAPE", f"{where} {name}", f"must have shape {list(weight.shape)}")
        if facts.dtype not in weight.dtypes:
            refuse("SHAPE", f"{where} {name}", f"must be {' or '.join(sorted(weight.dtypes))}")

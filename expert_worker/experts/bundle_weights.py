"""The weights of one expert of a bundle: read, and held against what the manifest promises."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expert_worker.experts.expert import ExpertWeights
from expert_worker.experts.expert_reader import ExpertReader, Scratch, check_finite, raw_bytes
from expert_worker.experts.loader import ExpertLoader
from expert_worker.experts.stored_weight import whole_weight
from moesaic.bundles import Bundle, BundleExpert
from moesaic.bundles.manifest import WEIGHTS_FILE
from moesaic.bundles.refusal import refuse
from moesaic.epoch import ExpertAddress
from moesaic.errors import DataLoss, FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class BundleWeights:
    """Reads the weights of one expert for its kind. `base` reads those of the model's own experts."""

    bundle: Bundle
    expert: BundleExpert
    base: ExpertLoader
    stopping: threading.Event
    _reader: ExpertReader = field(init=False)

    def __post_init__(self) -> None:
        weights = {
            name: whole_weight(self.bundle.tensors[tensor]) for name, tensor in self.expert.weights.items()
        }
        object.__setattr__(self, "_reader", ExpertReader(weights, self.stopping, self.scratch))

    @property
    def scratch(self) -> Scratch:
        return self.base.scratch

    def read(self, names: Sequence[str], weights: Tensor, biases: Tensor | None) -> None:
        """Fills equal runs of rows of `weights`, and of `biases`, with the weights of these names."""
        self._reader.read(names, weights, biases)
        for name in (*names, *(f"{name}_bias" for name in names if biases is not None)):
            self._check(name, self._reader.digest(name))

    def tensor(self, name: str) -> Tensor:
        """A weight on the host, in the dtype and shape in which it is stored."""
        if self.stopping.is_set():
            raise Unavailable("stopped while loading")
        entry = self.bundle.tensors[self.expert.weights[name]]
        stored = whole_weight(entry).data.read()
        self._check(name, hashlib.sha256(raw_bytes(stored)).digest())
        if stored.is_floating_point():
            check_finite(stored, entry.name)
        return stored

    def base_weights(self, slot: int, version: bytes) -> ExpertWeights:
        """The weights of a slot of the model's folder in this layer, on the host and in float32."""
        layer = self.expert.layer
        if slot >= self.base.model.experts[layer].num_slots:
            raise FailedPrecondition(f"bundle: the model has no slot {slot} in layer {layer}", field="bundle")
        found, weights = self.base.read(ExpertAddress(layer, slot), self.stopping)
        if found != version:
            raise FailedPrecondition(
                f"bundle: layer {layer} slot {slot} of the model is another version than the bundle was made on",
                field="bundle",
                reason="WRONG_VERSION",
            )
        return weights

    def _check(self, name: str, digest: bytes) -> None:
        _check_digest(self.bundle, self.expert.weights[name], digest)


def read_probe(bundle: Bundle, expert: BundleExpert) -> tuple[Tensor, Tensor]:
    """The probe vectors of an expert and the answers that it should give, both [P, D] float32.

    Raises InvalidArgument with field `bundle` for an expert without any, DataLoss if they are not those of the
    manifest.
    """
    where = f"layer {expert.layer}"
    if expert.probe is None:
        refuse("PROBE", where, "has no probe vectors")
    inputs, outputs = (_read_floats(bundle, name) for name in (expert.probe.inputs, expert.probe.outputs))
    if inputs.shape != outputs.shape or inputs.dim() != 2 or inputs.shape[1] != bundle.manifest.hidden_size:
        refuse("PROBE", where, f"probe vectors and answers must be [any, {bundle.manifest.hidden_size}]")
    return inputs, outputs


def _read_floats(bundle: Bundle, name: str) -> Tensor:
    if (
        name not in bundle.tensors
        or name not in bundle.manifest.tensors
        or bundle.tensors[name].dtype != "F32"
    ):
        refuse("PROBE", name[:64], "must be a tensor of float32")
    stored = whole_weight(bundle.tensors[name]).data.read()
    _check_digest(bundle, name, hashlib.sha256(raw_bytes(stored)).digest())
    return stored


def _check_digest(bundle: Bundle, tensor: str, digest: bytes) -> None:
    if digest.hex() != bundle.manifest.tensors[tensor].sha256:
        raise DataLoss(
            f"bundle: {WEIGHTS_FILE}: tensor {tensor} is not what the manifest promises",
            field="bundle",
            reason="BUNDLE_DIGEST",
        )

"""The weights of one expert of a bundle: read, and held against what the manifest promises."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expert_worker.experts.expert import ExpertWeights
from expert_worker.experts.expert_reader import ExpertReader, Scratch, check_finite, raw_bytes
from expert_worker.experts.loader import ExpertLoader
from expert_worker.experts.stored_weight import whole_weight
from moesaic.bundles import Bundle, BundleExpert, TensorFacts
from moesaic.bundles.manifest import WEIGHTS_FILE
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

    @property
    def _facts(self) -> Mapping[str, TensorFacts]:
        return {name: self.bundle.manifest.tensors[tensor] for name, tensor in self.expert.weights.items()}

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
        if digest.hex() != self._facts[name].sha256:
            raise DataLoss(
                f"bundle: {WEIGHTS_FILE}: tensor {self.expert.weights[name]} is not what the manifest promises",
                field="bundle",
                reason="BUNDLE_DIGEST",
            )

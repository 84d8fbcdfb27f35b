"""From a checkpoint to experts in memory: only the bytes of this worker's share, several experts at a time.

Each expert's weights are hashed into its version as they are stored, in the order of [outputs, inputs] whatever the
layout, decoded where they are encoded, checked to be finite, and laid out or quantised as they will be read. An expert
takes one thread, and only as many are under way as there are threads, so that a second copy of the share never comes to be.
"""

# Shapes: O outputs, I inputs of a weight; R rows of it as it is stored.

from __future__ import annotations

import hashlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from expert_worker.dequantise import dequantise_fp8_block, dequantise_mxfp4
from expert_worker.expert import (
    ExpertForm,
    ExpertWeights,
    assemble_expert,
    can_stack,
    empty_weights,
    make_linear,
)
from expert_worker.expert_store import HeldExpert
from expert_worker.stored_weight import Region, StoredWeight, locate
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, Unavailable
from moesaic.families import MoeModel
from moesaic.families.model import Encoding, ExpertModule
from moesaic.families.tensor_check import FP8_BLOCK
from moesaic.manifest import ExpertAddress, VersionHasher

# More wait for the disk and for memory, not for a thread.
MAX_THREADS = 4
# Of an encoded weight that are decoded at once: what they become stays in the cache.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert is to be: with a stack, in entry `index` of it."""

    address: ExpertAddress
    stack: ExpertWeights | None = None
    index: int = 0

    def memory(self, module: ExpertModule, form: ExpertForm) -> ExpertWeights:
        """For its weights: its entry of the stack, or memory of its own."""
        return empty_weights(module, form) if self.stack is None else self.stack[self.index]


def choose_places(model: MoeModel, addresses: Iterable[ExpertAddress], form: ExpertForm) -> Iterator[Place]:
    """In order of layer and slot."""
    for layer, of_layer in groupby(sorted(addresses), key=lambda address: address.layer):
        group, module = list(of_layer), model.experts[layer].module
        stack = empty_weights(module, form, len(group)) if can_stack(form, module) else None
        for index, address in enumerate(group):
            yield Place(address, stack, index)


def load_experts(
    checkpoint: Checkpoint,
    model: MoeModel,
    addresses: Iterable[ExpertAddress],
    form: ExpertForm,
    *,
    stopping: threading.Event | None = None,
) -> Iterator[tuple[ExpertAddress, HeldExpert]]:
    """Loads the experts, and gives them in order of layer and slot. Raises CheckpointError that names the tensor or the
    file at fault, Unavailable when `stopping` is set."""
    loader = _Loader(checkpoint, model, form, stopping or threading.Event())
    places = choose_places(model, addresses, form)
    threads = min(MAX_THREADS, torch.get_num_threads())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="expert-load")
    under_way: deque[tuple[ExpertAddress, Future[HeldExpert]]] = deque()

    def begin(places: Iterable[Place]) -> None:
        under_way.extend((place.address, pool.submit(loader.load, place)) for place in places)

    try:
        begin(islice(places, threads))
        while under_way:
            address, loading = under_way.popleft()
            held = loading.result()
            begin(islice(places, 1))
            yield address, held
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Loader:
    checkpoint: Checkpoint
    model: MoeModel
    form: ExpertForm
    stopping: threading.Event

    def load(self, place: Place) -> HeldExpert:
        """One expert, on one thread."""
        experts, form = self.model.experts[place.address.layer], self.form
        module = experts.module
        reader = _ExpertReader(locate(self.checkpoint, experts, place.address), self.stopping)
        memory = place.memory(module, form)
        up_weight, down_weight = memory.up, memory.down
        up_bias, down_bias = memory.up_bias, memory.down_bias
        # The two products are laid out one after the other, and what they are made from goes as soon as it can.
        del memory
        gate_and_up = ("gate", "up") if module.gated else ("up",)
        reader.read(gate_and_up, up_weight, up_bias)
        up = make_linear(up_weight, up_bias, form)
        del up_weight
        reader.read(("down",), down_weight, down_bias)
        down = make_linear(down_weight, down_bias, form)
        version = reader.version(module, experts.dtype)
        return HeldExpert(version, assemble_expert(up, down, module, form, place.stack, place.index))


class _ExpertReader:
    """Reads the weights of one expert, and names it by what it has read."""

    def __init__(self, weights: Mapping[str, StoredWeight], stopping: threading.Event) -> None:
        self._weights = weights
        self._stopping = stopping
        self._digests: dict[str, tuple[tuple[int, ...], bytes]] = {}
        # Gate and up may share what holds them: it is read once.
        self._uses = Counter(region for weight in weights.values() for region in weight.regions)
        self._shared: dict[Region, Tensor] = {}

    def read(self, names: Sequence[str], weights: Tensor, biases: Tensor | None) -> None:
        """Fills equal runs of rows of `weights` with the weights of these names, and `biases` with theirs."""
        for name, target in zip(names, weights.chunk(len(names)), strict=True):
            self._read(name, target)
        if biases is not None:
            for name, target in zip(names, biases.chunk(len(names)), strict=True):
                self._read(f"{name}_bias", target)

    def version(self, module: ExpertModule, dtype: str) -> bytes:
        kind = f"{'glu' if module.gated else 'mlp'} {module.activation}"
        hasher = VersionHasher(kind if module.limit is None else f"{kind} {module.limit}", dtype)
        for name in module.weights:
            hasher.update(name, *self._digests[name])
        return hasher.digest()

    def _read(self, name: str, target: Tensor) -> None:
        weight = self._weights[name]
        data = self._fetch(weight.data)
        if weight.scales is None:
            digest = _copy(weight, data, target)
        else:
            digest = _decode(weight, data, self._fetch(weight.scales), target)
        self._digests[name] = tuple(target.shape), digest

    def _fetch(self, region: Region) -> Tensor:
        if self._stopping.is_set():
            raise Unavailable("stopped while loading")
        read = self._shared.pop(region, None)
        if read is None:
            read = region.read()
        self._uses[region] -= 1
        if self._uses[region]:
            self._shared[region] = read
        return read


def _copy(weight: StoredWeight, data: Tensor, target: Tensor) -> bytes:
    """Fills the target with a weight that is stored as plain numbers; returns the digest of them."""
    own = data.view(len(data), -1)[weight.rows, weight.columns]
    own = (own.T if weight.transposed else own).contiguous()
    _check_finite(own, weight)
    target.copy_(own.view(target.shape))
    return hashlib.sha256(_raw_bytes(own)).digest()


def _decode(weight: StoredWeight, data: Tensor, scales: Tensor, target: Tensor) -> bytes:
    """Fills the target with what an encoded weight stands for; returns the digest of the code."""
    own, own_scales = data[weight.rows], _scales_of_rows(weight, len(data), scales)
    filled = target.T if weight.transposed else target
    parts = (tensor.split(_ROWS_AT_ONCE) for tensor in (own, own_scales, filled))
    for codes, factors, part in zip(*parts, strict=True):
        decoded = _DEQUANTISE[weight.encoding](codes, factors)[:, weight.columns]
        _check_finite(decoded, weight)
        part.copy_(decoded.to(part.dtype))
    where = f"{weight.encoding} {weight.columns} {weight.transposed} {weight.scale_row}\0"
    digest = hashlib.sha256(where.encode())
    digest.update(_raw_bytes(own))
    digest.update(_raw_bytes(own_scales if weight.encoding == "mxfp4" else scales))
    return digest.digest()


_DEQUANTISE: dict[Encoding, Callable[[Tensor, Tensor], Tensor]] = {
    "fp8_block": dequantise_fp8_block,
    "mxfp4": dequantise_mxfp4,
}


def _scales_of_rows(weight: StoredWeight, num_rows: int, scales: Tensor) -> Tensor:
    """The scales of every own row: of mxfp4 they are stored so, of fp8_block a row of them serves a block."""
    if weight.encoding == "mxfp4":
        return scales[weight.rows]
    blocks = torch.arange(weight.scale_row, weight.scale_row + num_rows)[weight.rows] // FP8_BLOCK
    return scales.index_select(0, blocks)


def _raw_bytes(stored: Tensor) -> memoryview:
    return stored.reshape(-1).view(torch.uint8).numpy().data


def _check_finite(numbers: Tensor, weight: StoredWeight) -> None:
    # Two numbers tell: the extremes of a tensor with NaN are NaN.
    if not all(extreme.isfinite().item() for extreme in torch.aminmax(numbers)):
        name = weight.data.tensor
        raise CheckpointError(f"tensor {name} holds NaN or infinity", field=name)

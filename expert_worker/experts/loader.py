"""Loads experts from a checkpoint: only the bytes of this worker's share, several experts at a time.

Each expert's weights are hashed into its version as they are stored, in the order [outputs, inputs] whatever
the layout, decoded where they are encoded, checked to be finite, and laid out or quantised in the form in
which they are computed. One thread loads one expert, and no more experts are under way than there are
threads, so that the share never exists twice in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import Tensor

from expert_worker.experts.expert import (
    Expert,
    ExpertForm,
    ExpertWeights,
    MlpExpert,
    assemble_expert,
    empty_weights,
    make_linear,
)
from expert_worker.experts.expert_reader import ExpertReader, Scratch
from expert_worker.experts.kept.experts import KeptExperts
from expert_worker.experts.load_threads import start_load_threads
from expert_worker.experts.stack import ExpertStacks, Place
from expert_worker.experts.store import HeldExpert
from expert_worker.experts.stored_weight import locate
from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.linear import keeps_weight
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel
from moesaic.families.model import ExpertModule

# More threads would only wait for the disk and for memory.
MAX_THREADS = 4


class WeightReader(Protocol):
    """What an expert's weights are read with, by their names in the module."""

    def read(self, names: Sequence[str], weights: Tensor, biases: Tensor | None) -> None:
        """Fills equal runs of rows of `weights`, and of `biases`, with the weights of these names."""
        ...


def choose_places(
    model: MoeModel, addresses: Iterable[ExpertAddress], stacks: ExpertStacks
) -> Iterator[tuple[ExpertAddress, Place]]:
    """The places in order of layer and slot. A layer's experts share a stack where that can be computed."""
    for layer, of_layer in groupby(sorted(addresses), key=lambda address: address.layer):
        group, module = list(of_layer), model.experts[layer].module
        stacks.reserve(layer, module, len(group))
        for address in group:
            yield address, stacks.place(layer, module)


def load_experts(
    checkpoint: Checkpoint,
    model: MoeModel,
    addresses: Iterable[ExpertAddress],
    form: ExpertForm,
    *,
    stacks: ExpertStacks | None = None,
    kept: KeptExperts | None = None,
    stopping: threading.Event | None = None,
) -> Iterator[tuple[ExpertAddress, HeldExpert]]:
    """Loads the experts, and yields them in order of layer and slot.

    Raises CheckpointError that names the tensor or the file at fault, Unavailable when `stopping` is set.
    """
    addresses = list(addresses)
    loader = ExpertLoader(checkpoint, model, form, kept)
    stopping = stopping or threading.Event()
    places = choose_places(model, addresses, stacks or ExpertStacks(form))
    threads = max(1, min(MAX_THREADS, torch.get_num_threads(), len(addresses)))
    pool = start_load_threads(threads)
    under_way: deque[tuple[ExpertAddress, Future[HeldExpert]]] = deque()

    def begin(places: Iterable[tuple[ExpertAddress, Place]]) -> None:
        under_way.extend((place[0], pool.submit(loader.load, *place, stopping)) for place in places)

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
class ExpertLoader:
    """Loads single experts of the model's folder."""

    checkpoint: Checkpoint
    model: MoeModel
    form: ExpertForm
    kept: KeptExperts | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def load(self, address: ExpertAddress, place: Place, stopping: threading.Event) -> HeldExpert:
        """Loads one expert on the calling thread, from shared memory where it is kept."""
        if self.kept is not None and (found := self.kept.find_base(address)) is not None:
            return found
        experts = self.model.experts[address.layer]
        reader = ExpertReader(locate(self.checkpoint, experts, address), stopping, self.scratch)
        expert = build_mlp(reader, experts.module, self.form, place, self.scratch)
        version = reader.version(experts.module, experts.dtype)
        return HeldExpert(version, self.keep(version, expert))

    def find(self, version: bytes) -> Expert | None:
        """The expert with this digest, if it is kept in shared memory."""
        return None if self.kept is None else self.kept.find(version)

    def keep(self, version: bytes, expert: Expert) -> Expert:
        """The expert, in shared memory where weights are kept."""
        return expert if self.kept is None else self.kept.keep(version, expert)

    def forget(self, versions: Iterable[bytes]) -> None:
        """Keeps experts no longer that are not held any more."""
        for version in versions:
            if self.kept is not None:
                self.kept.drop(version)

    def read(self, address: ExpertAddress, stopping: threading.Event) -> tuple[bytes, ExpertWeights]:
        """The version of an expert and its weights, on the host and in float32."""
        experts = self.model.experts[address.layer]
        module = experts.module
        weights = empty_weights(module, ExpertForm(torch.device("cpu"), torch.float32))
        reader = ExpertReader(locate(self.checkpoint, experts, address), stopping, self.scratch)
        reader.read(up_names(module), weights.up, weights.up_bias)
        reader.read(("down",), weights.down, weights.down_bias)
        return reader.version(module, experts.dtype), weights


def build_mlp(
    reader: WeightReader, module: ExpertModule, form: ExpertForm, place: Place, scratch: Scratch
) -> MlpExpert:
    """An expert from the weights that the reader reads."""
    memory = _memory(module, form, place, scratch)
    reader.read(up_names(module), memory.up, memory.up_bias)
    up = make_linear(memory.up, memory.up_bias, form)
    reader.read(("down",), memory.down, memory.down_bias)
    down = make_linear(memory.down, memory.down_bias, form)
    return assemble_expert(up, down, module, form, place.row)


def up_names(module: ExpertModule) -> tuple[str, ...]:
    """The names of the weights of the first product, in the order of its outputs."""
    return ("gate", "up") if module.gated else ("up",)


def _memory(module: ExpertModule, form: ExpertForm, place: Place, scratch: Scratch) -> ExpertWeights:
    """The memory that the expert's weights are read into.

    Products that copy their weights into another layout need them only until then. Such weights are read
    into scratch memory, which the expert's other product and the next expert use again.
    """
    memory = place.memory(module, form)
    sizes = (module.hidden_size, module.inner_size)
    kept = any(keeps_weight(form.weights, form.device, form.dtype, size) for size in sizes)
    if kept or place.row is not None:
        return memory
    most = max(memory.up.nbytes, memory.down.nbytes)
    taken = scratch.take("weights", most).view(form.dtype)
    up, down = (taken[: weight.numel()].view_as(weight) for weight in (memory.up, memory.down))
    return replace(memory, up=up, down=down)

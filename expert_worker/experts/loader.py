"""Loads experts from a checkpoint: only the bytes of this worker's share, several experts at a time.

Each expert's weights are hashed into its version as they are stored, in the order [outputs, inputs] whatever
the layout, decoded where they are encoded, checked to be finite, and laid out or quantised in the form in
which they are computed. One thread loads one expert, and no more experts are under way than there are
threads, so that the share never exists twice in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

import torch

from expert_worker.experts.expert import (
    ExpertForm,
    ExpertWeights,
    assemble_expert,
    can_stack,
    empty_weights,
    make_linear,
)
from expert_worker.experts.expert_reader import ExpertReader, Scratch
from expert_worker.experts.store import HeldExpert
from expert_worker.experts.stored_weight import locate
from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.linear import keeps_weight
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel
from moesaic.families.model import ExpertModule

# More threads would only wait for the disk and for memory.
MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert will lie: in entry `index` of a stack, or in memory of its own."""

    address: ExpertAddress
    stack: ExpertWeights | None = None
    index: int = 0

    def memory(self, module: ExpertModule, form: ExpertForm) -> ExpertWeights:
        """The memory for its weights."""
        return empty_weights(module, form) if self.stack is None else self.stack[self.index]


def choose_places(model: MoeModel, addresses: Iterable[ExpertAddress], form: ExpertForm) -> Iterator[Place]:
    """The places in order of layer and slot. A layer's experts share a stack where that can be computed."""
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
    """Loads the experts, and yields them in order of layer and slot.

    Raises CheckpointError that names the tensor or the file at fault, Unavailable when `stopping` is set.
    """
    addresses = list(addresses)
    loader = _Loader(checkpoint, model, form, stopping or threading.Event())
    places = choose_places(model, addresses, form)
    threads = max(1, min(MAX_THREADS, torch.get_num_threads(), len(addresses)))
    pool = _start_threads(threads)
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


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute without torch's helper threads, which would compete with each other."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        ready.wait()

    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="expert-load", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    # torch sets the number for the calling thread and for all threads that start later; the latter is not
    # wanted.
    torch.set_num_threads(num_threads)
    return pool


@dataclass(frozen=True, slots=True)
class _Loader:
    checkpoint: Checkpoint
    model: MoeModel
    form: ExpertForm
    stopping: threading.Event
    scratch: Scratch = field(default_factory=Scratch)

    def load(self, place: Place) -> HeldExpert:
        """Loads one expert on the calling thread."""
        experts, form = self.model.experts[place.address.layer], self.form
        module = experts.module
        reader = ExpertReader(locate(self.checkpoint, experts, place.address), self.stopping, self.scratch)
        memory = self._memory(place, module)
        gate_and_up = ("gate", "up") if module.gated else ("up",)
        reader.read(gate_and_up, memory.up, memory.up_bias)
        up = make_linear(memory.up, memory.up_bias, form)
        reader.read(("down",), memory.down, memory.down_bias)
        down = make_linear(memory.down, memory.down_bias, form)
        version = reader.version(module, experts.dtype)
        return HeldExpert(version, assemble_expert(up, down, module, form, place.stack, place.index))

    def _memory(self, place: Place, module: ExpertModule) -> ExpertWeights:
        """The memory that the expert's weights are read into.

        Products that copy their weights into another layout need them only until then. Such weights are read
        into scratch memory, which the expert's other product and the next expert use again.
        """
        form, memory = self.form, place.memory(module, self.form)
        sizes = (module.hidden_size, module.inner_size)
        if any(keeps_weight(form.weights, form.device, form.dtype, size) for size in sizes):
            return memory
        most = max(memory.up.nbytes, memory.down.nbytes)
        scratch = self.scratch.take("weights", most).view(form.dtype)
        up, down = (scratch[: weight.numel()].view_as(weight) for weight in (memory.up, memory.down))
        return replace(memory, up=up, down=down)

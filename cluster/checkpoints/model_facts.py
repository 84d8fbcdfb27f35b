"""The parts of a model and the memory that they need. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.control.placement import MAX_WORKERS, layer_loads, place_experts
from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import MoeModel
from moesaic.families.model import (
    Attention,
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    ExpertModule,
    Hyena,
    LatentAttention,
    Mixer,
)

# The formats in which experts can be held.
Held = Literal["fp32", "bf16", "int8", "int4"]
HELD: tuple[Held, ...] = ("fp32", "bf16", "int8", "int4")
WORKER_COUNTS = (1, 2, 4, 8)

_ITEM_BYTES = {"fp32": 4, "bf16": 2}
# An int8 weight has one scale per output. Biases are not quantised.
_SCALE_BYTES = 4
# An int4 weight has a scale and a zero, in bf16, for every group of inputs. Its kernel takes outputs in tiles.
_INT4_GROUP, _INT4_TILE = 32, 16
_INT4_GROUP_BYTES = _INT4_GROUP // 2 + 4
_INT4_BIAS_BYTES = 2
_LAYER_INDEX = re.compile(r"\.(\d+)\.")
_SHARED = re.compile(r"\.shared_(expert|experts|mlp)\.")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A set of identical layers.

    Without a gate they are dense: the router computes them where `experts` is 0, else the workers do, as one
    expert.
    """

    layers: tuple[int, ...]
    mixer: str
    gated: bool
    experts: int
    # The experts that a token is assigned to.
    top_k: int
    # Inner size and parameters of one expert.
    inner_size: int
    parameters: int
    # The parameters of shared experts, which the router computes for every token.
    shared_parameters: int


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The fullest of `workers` workers: its experts, and their bytes by format, without one that they cannot have."""

    workers: int
    experts: int
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`*_file_bytes`: bytes of tensors in the files.

    `router_bytes`: bytes of the router's weights, by compute dtype. `untied`: the parameters that the config ties to others
    and that the files have with values of their own, which count.
    """

    parameters: int
    active_parameters: int
    hidden_size: int
    vocab_size: int
    context_length: int
    experts: int
    expert_file_bytes: int
    router_file_bytes: int
    layers: tuple[LayerKind, ...]
    router_bytes: dict[str, int]
    worker_memory: tuple[WorkerMemory, ...]
    untied: tuple[str, ...]


def gather_facts(checkpoint: Checkpoint, model: MoeModel) -> ModelFacts:
    """The facts about a described model."""
    router_tensors = {
        name for tensor in model.dense.values() for name in (tensor.source, tensor.scales) if name is not None
    }
    return ModelFacts(
        parameters=model.num_parameters,
        active_parameters=model.num_active_parameters,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_length=model.max_model_len,
        experts=len(model.addresses),
        expert_file_bytes=_file_bytes(checkpoint, model.expert_tensors),
        router_file_bytes=_file_bytes(checkpoint, router_tensors),
        layers=_layer_kinds(model),
        router_bytes={held: model.num_dense_parameters * _ITEM_BYTES[held] for held in ("fp32", "bf16")},
        worker_memory=tuple(_worker_memory(model)),
        untied=model.untied,
    )


def expert_bytes(module: ExpertModule, held: Held) -> int | None:
    """The bytes of one expert's weights in a worker's memory; None where their sizes are none that int4 can have."""
    total = 0
    for weight in module.weights:
        num_bytes = _weight_bytes(module.shape(weight), held)
        if num_bytes is None:
            return None
        total += num_bytes
    return total


def _weight_bytes(shape: tuple[int, ...], held: Held) -> int | None:
    is_bias = len(shape) == 1
    match held:
        case "int8":
            return shape[0] * _SCALE_BYTES + (0 if is_bias else math.prod(shape))
        case "int4" if is_bias:
            return shape[0] * _INT4_BIAS_BYTES
        case "int4":
            fits = shape[0] % _INT4_TILE == 0 and shape[1] % _INT4_GROUP == 0
            return math.prod(shape) // _INT4_GROUP * _INT4_GROUP_BYTES if fits else None
        case _:
            return math.prod(shape) * _ITEM_BYTES[held]


def held_bytes(model: MoeModel, held: Held) -> int | None:
    """The bytes of all experts in this form, or None where they cannot have it."""
    return _held_bytes(model, {layer: experts.num_slots for layer, experts in model.experts.items()}, held)


def _file_bytes(checkpoint: Checkpoint, names: set[str] | frozenset[str]) -> int:
    return sum(checkpoint.tensors[name].num_bytes for name in names)


def _worker_memory(model: MoeModel) -> Iterator[WorkerMemory]:
    loads = layer_loads(model)
    for workers in WORKER_COUNTS:
        if workers > min(MAX_WORKERS, len(model.addresses)):
            return
        counts = [Counter(expert.layer for expert in held) for held in place_experts(loads, workers)]
        yield WorkerMemory(
            workers,
            experts=max(count.total() for count in counts),
            bytes={
                held: num_bytes for held in HELD if (num_bytes := _fullest(model, counts, held)) is not None
            },
        )


def _fullest(model: MoeModel, counts: Sequence[Mapping[int, int]], held: Held) -> int | None:
    """The bytes of the worker that holds the most."""
    found = [num_bytes for count in counts if (num_bytes := _held_bytes(model, count, held)) is not None]
    return max(found) if len(found) == len(counts) else None


def _held_bytes(model: MoeModel, counts: Mapping[int, int], held: Held) -> int | None:
    total = 0
    for layer, count in counts.items():
        num_bytes = expert_bytes(model.experts[layer].module, held)
        if num_bytes is None:
            return None
        total += count * num_bytes
    return total


def _layer_kinds(model: MoeModel) -> tuple[LayerKind, ...]:
    """The kinds, in the order of their first layers."""
    shared = _shared_parameters(model)
    kinds: dict[LayerKind, list[int]] = {}
    for layer in range(model.num_layers):
        kinds.setdefault(_kind(model, layer, shared[layer]), []).append(layer)
    return tuple(replace(kind, layers=tuple(layers)) for kind, layers in kinds.items())


def _kind(model: MoeModel, layer: int, shared: int) -> LayerKind:
    """The kind of one layer, without the layer's number."""
    experts, mixer = model.experts.get(layer), describe_mixer(model.mixers[layer])
    if experts is None:
        return LayerKind((), mixer, False, 0, 0, 0, 0, shared)
    return LayerKind(
        layers=(),
        mixer=mixer,
        gated=experts.gate is not None,
        experts=experts.num_slots,
        top_k=experts.top_k,
        inner_size=experts.module.inner_size,
        parameters=experts.module.num_parameters,
        shared_parameters=shared,
    )


def _shared_parameters(model: MoeModel) -> Counter[int]:
    """The parameters of each layer's shared experts, found by the names that all families use."""
    shared = Counter[int]()
    for name, tensor in model.dense.items():
        if _SHARED.search(name) and (index := _LAYER_INDEX.search(name)):
            shared[int(index[1])] += math.prod(tensor.shape)
    return shared


def describe_mixer(mixer: Mixer) -> str:
    """A description for a person, in one line."""
    match mixer:
        case Attention(num_heads, num_kv_heads, _, window, chunk, sinks):
            parts = [f"attention, {num_heads}/{num_kv_heads} heads"]
            parts += [f"window {window}"] if window else []
            parts += [f"chunk {chunk}"] if chunk else []
            return ", ".join([*parts, "sinks"] if sinks else parts)
        case LatentAttention(num_heads):
            return f"latent attention, {num_heads} heads"
        case Hyena(state_size):
            return f"hyena, {state_size} modes"
        case EncoderAttention(num_heads):
            return f"encoder attention, {num_heads} heads"
        case DecoderAttention(num_heads):
            return f"decoder attention, {num_heads} heads"
        case CrossAttention(num_heads):
            return f"cross attention, {num_heads} heads"

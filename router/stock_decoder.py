"""The transformers model of a checkpoint with our parts in its three seams: attention, gate, experts.

It is built on the meta device; only tensors that hold no expert weights are read, so the experts never exist in this
process. Every family of transformers that uses its experts interface has the same seams. Where `lean_decoder.py` knows
the family too, this is the reference that it must equal.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, E experts (slots), K experts per token,
N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import GateRule, MoeModel
from router.attention import attend
from router.batch import Layout, PackedBatch
from router.dense_tensors import dense_names, read_dense
from router.dispatcher import DispatchStep
from router.gate import assign
from router.kv_cache import KVCache
from router.model import MicroBatch
from router.phases import PhaseClock

ATTENTION_NAME = "moesaic_paged"
EXPERTS_NAME = "moesaic_remote"

# (layer, hidden [T, D], slots [T, K], weights [T, K]) -> [T, D]
ComputeExperts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention needs to know of the step; it reaches `paged_attention` as an argument of the model's forward."""

    batch: PackedBatch
    cache: KVCache
    clock: PhaseClock


class StockDecoder:
    """A RouterModel of any family. Micro-batches pass one after the other: a module tree cannot be left half way."""

    def __init__(self, checkpoint: Checkpoint, shape: MoeModel, layout: Layout, *, clock: PhaseClock) -> None:
        self.layout = layout
        self._clock = clock
        self._model = _build(checkpoint, layout.dtype)
        _load(self._model, checkpoint, shape, layout)
        _replace_gates(self._model, shape, clock)
        _attach_experts(self._model, self._compute_experts)
        self._experts: DispatchStep | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that live in this process."""
        return sum(
            tensor.nbytes
            for tensor in (*self._model.parameters(), *self._model.buffers())
            if tensor.device.type != "meta"
        )

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        return torch.cat([self._forward(part, cache) for part in parts])

    def _forward(self, part: MicroBatch, cache: KVCache) -> torch.Tensor:
        self._experts = part.experts
        output = self._model(
            input_ids=part.batch.token_ids,
            position_ids=part.batch.positions,
            use_cache=False,
            logits_to_keep=part.rows,
            step=AttentionStep(part.batch, cache, self._clock),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _compute_experts(
        self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._experts is not None
        return self._experts.compute(layer, hidden, slots, weights)


class Gate(nn.Module):
    """Takes the place of the family's own gate and returns what transformers expects of one: rows [E, D] and a rule."""

    def __init__(self, weight: torch.Tensor, rule: GateRule, clock: PhaseClock) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rule = rule
        self._clock = clock

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores hidden [.., D] as T rows: logits [T, E], weights [T, K], slots [T, K]."""
        started = time.perf_counter()
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        assignment = assign(logits, self._rule)
        self._clock.add("gate", time.perf_counter() - started)
        return logits, *assignment


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, d], key and value [1, G, T, d] -> ([1, T, H * d], None). Masks are the batch's own."""
    started = time.perf_counter()
    layer: int = module.layer_idx  # type: ignore[assignment]
    rows = torch.cat((key, value), dim=1)[0].transpose(0, 1).flatten(1)
    step.cache.write(layer, step.batch.cache_positions, rows)
    queries = query[0].transpose(0, 1).contiguous()
    output = attend(layer, queries, step.batch, step.cache, scaling)
    step.clock.add("attention", time.perf_counter() - started)
    return output[None], None


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    # Masks are the batch's own, so the model builds none.
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _remote_experts)
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.set_experts_implementation(EXPERTS_NAME)
    model.eval()
    return model


def _load(model: PreTrainedModel, checkpoint: Checkpoint, shape: MoeModel, layout: Layout) -> None:
    """Reads every tensor but the experts', and checks that just those are left on meta."""
    names = dense_names(checkpoint, shape)
    if model.config.tie_word_embeddings:
        names -= {"lm_head.weight"}
    tensors = {
        _module_name(name): tensor
        for name, tensor in read_dense(checkpoint, names, dtype=layout.dtype, device=layout.device)
    }
    unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise CheckpointError(f"tensor {unexpected[0]} is not part of the model", field=unexpected[0])
    model.tie_weights()
    _rebuild_buffers(model, layout.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.device.type == "meta" and ".experts." not in name:
            raise CheckpointError(f"tensor {name} is missing", field=name)


def _module_name(tensor: str) -> str:
    """A tensor's name in the modules of transformers 5, where Mixtral's block is called as everybody's is."""
    return tensor.replace(".block_sparse_moe.", ".mlp.")


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies are computed, not stored: after a build on meta they must be computed again."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if any(buffer.device.type == "meta" for buffer in child.buffers(recurse=False)):
                setattr(parent, name, type(child)(config=model.config).to(device))


def _replace_gates(model: PreTrainedModel, shape: MoeModel, clock: PhaseClock) -> None:
    for layer in _decoder_layers(model):
        layer.mlp.gate = Gate(layer.mlp.gate.weight.data, shape.gate, clock)


def _attach_experts(model: PreTrainedModel, compute_experts: ComputeExperts) -> None:
    for index, layer in enumerate(_decoder_layers(model)):
        layer.mlp.experts.layer_index = index
        layer.mlp.experts.compute_experts = compute_experts


def _decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the decoder; which parts they have is a matter of the family."""
    return list(model.get_decoder().layers)


def _remote_experts(
    experts: Any, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts seam of transformers: hidden [T, D], slots and weights [T, K] -> [T, D]."""
    result: torch.Tensor = experts.compute_experts(experts.layer_index, hidden, slots, weights)
    return result

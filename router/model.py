"""The transformers model of a checkpoint with Moesaic's parts in its three seams: attention, gate, experts.

It is built on the meta device; only tensors that hold no expert weights are read, so the experts never exist in this
process. Every family of transformers that uses its experts interface has the same seams.

Shapes: T tokens, D hidden size, K experts per token, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel
from router import attention
from router.batch import PackedBatch
from router.dispatcher import DispatchStep
from router.gate import Gate
from router.kv_cache import KVCache
from router.phases import PhaseClock

EXPERTS_NAME = "moesaic_remote"

# (layer, hidden [T, D], slots [T, K], weights [T, K]) -> [T, D]
ComputeExperts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one pass through the layers works on: a batch, the rows of it whose logits are wanted, its experts."""

    batch: PackedBatch
    rows: torch.Tensor  # [N]
    experts: DispatchStep


class RouterModel:
    """Attention, gates, norms, embeddings and head of one model; what experts compute comes from elsewhere."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: MoeModel,
        *,
        dtype: torch.dtype,
        device: torch.device,
        clock: PhaseClock,
    ) -> None:
        self.device = device
        self._clock = clock
        self._model = _build(checkpoint, dtype)
        _load(self._model, checkpoint, shape, dtype, device)
        _replace_gates(self._model, shape, clock)
        _attach_experts(self._model, self._compute_experts)
        self._experts: DispatchStep | None = None
        self.window = shape.sliding_window

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
            step=attention.AttentionStep(part.batch, cache, self._clock),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _compute_experts(
        self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._experts is not None
        return self._experts.compute(layer, hidden, slots, weights)


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    attention.register()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _remote_experts)
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
    model.set_experts_implementation(EXPERTS_NAME)
    model.eval()
    return model


def _load(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    shape: MoeModel,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Reads every tensor but the experts', and checks that just those are left on meta."""
    tensors = _read_dense(checkpoint, shape, dtype, device)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise CheckpointError(f"tensor {unexpected[0]} is not part of the model", field=unexpected[0])
    model.tie_weights()
    _rebuild_buffers(model, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.device.type == "meta" and ".experts." not in name:
            raise CheckpointError(f"tensor {name} is missing", field=name)


def _read_dense(
    checkpoint: Checkpoint, shape: MoeModel, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    experts = shape.expert_tensors
    by_file: dict[Any, list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        if name not in experts and not name.endswith("rotary_emb.inv_freq"):
            by_file.setdefault(entry.file, []).append(name)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                # A copy: without it the tensor is a view of the mapped file.
                tensors[_module_name(name)] = shard.get_tensor(name).to(device, dtype, copy=True)
    return tensors


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

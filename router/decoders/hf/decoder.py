"""The transformers model of a checkpoint with our parts in its three seams: attention, gate, experts.

It is built on the meta device, and only what belongs to the router is read: experts never exist in this process. Where
the wiring of a family is known, our block takes the place of its own; any other family that uses the experts interface
of transformers keeps its gate. Where `lean_decoder.py` knows the family too, this is the reference that it must equal.

Shapes: T tokens, D hidden size, K experts per token, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError, Unsupported
from moesaic.families.model import LatentAttention, MoeModel
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch
from router.decoders.dense_tensors import read_dense
from router.decoders.hf.attention import ATTENTION_NAME, AttentionStep, Temperature, register_attention
from router.decoders.hf.config import blaming_config, modules_config
from router.decoders.hf.latent_attention import LatentAttentionModule
from router.decoders.hf.moe_block import CurrentStep, MoeBlock, RemoteExperts, RemoteMlp
from router.decoders.hf.wiring import WIRINGS, Wiring
from router.gating.gate import Assignment
from router.gating.gate_stats import GateHealth
from router.phase_clock import PhaseClock

EXPERTS_NAME = "moesaic_remote"


class StockDecoder:
    """A RouterModel of any family. Micro-batches pass one after the other: a module tree cannot be left half way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: MoeModel,
        layout: AttentionLayout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        self.layout = layout
        self.gates = GateHealth.of(model)
        self._clock = clock
        self._mixers = model.mixers
        self._step = CurrentStep()
        self._modules = _build(checkpoint, model, num_positions, layout.dtype)
        exact = _exact_tensors(self._modules)
        _replace_blocks(self._modules, model, self._step, clock)
        _replace_attention(self._modules, model)
        _watch_gates(self._modules, model, self.gates)
        _load(self._modules, checkpoint, model, layout, exact)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that live in this process."""
        return sum(tensor.nbytes for tensor in (*self._modules.parameters(), *self._modules.buffers()))

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        self.gates.begin_step()
        return torch.cat([self._forward(part, cache) for part in parts])

    def _forward(self, part: MicroBatch, cache: KVCache) -> torch.Tensor:
        self._step.experts = part.experts
        output = self._modules(
            input_ids=part.batch.token_ids,
            position_ids=part.batch.positions,
            use_cache=False,
            logits_to_keep=part.rows,
            step=AttentionStep(part.batch, cache, self._mixers, self._clock),
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _build(
    checkpoint: Checkpoint, model: MoeModel, num_positions: int, dtype: torch.dtype
) -> PreTrainedModel:
    register_attention()
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _remote_experts)
    config = modules_config(checkpoint, model, num_positions)
    with blaming_config(checkpoint), torch.device("meta"):
        modules: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    modules.set_experts_implementation(EXPERTS_NAME)
    modules.eval()
    return modules


def _replace_blocks(modules: PreTrainedModel, model: MoeModel, step: CurrentStep, clock: PhaseClock) -> None:
    """Leaves no expert in the modules: what computes them elsewhere takes their place."""
    wiring = WIRINGS.get(model.family, Wiring())
    layers = _decoder_layers(modules)
    for index, layer in sorted(model.experts.items()):
        remote = RemoteExperts(index, step)
        if layer.gate is None:
            layers[index].set_submodule(wiring.block, RemoteMlp(remote))
        elif layer.gate.own:
            _empty_experts(layers[index], remote)
        else:
            block = MoeBlock(layers[index].get_submodule(wiring.block), wiring, layer, remote, clock)
            layers[index].set_submodule(wiring.block, block)


def _empty_experts(layer: nn.Module, remote: RemoteExperts) -> None:
    """Of a block that stays: its experts have no weights any more, and are computed by `_remote_experts`."""
    experts: Any = next(module for name, module in layer.named_modules() if name.split(".")[-1] == "experts")
    experts.remote = remote
    for name in list(experts._parameters):
        delattr(experts, name)


def _watch_gates(modules: PreTrainedModel, model: MoeModel, gates: GateHealth) -> None:
    """A gate is known by its rows, whoever it belongs to; a projection of attention may have as many."""
    layers = _decoder_layers(modules)
    for index in gates.gates:
        experts = model.experts[index]
        rows = (experts.num_slots, experts.module.hidden_size)
        for name, module in layers[index].named_modules():
            weight = getattr(module, "weight", None)
            if (
                isinstance(weight, torch.Tensor)
                and weight.shape == rows
                and not name.startswith("self_attn.")
            ):
                gates.watch(index, module)
                break


def _remote_experts(
    experts: Any, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts seam of transformers: hidden [T, D], slots and weights [T, K] -> [T, D]."""
    remote: RemoteExperts = experts.remote
    return remote.receive(remote.send(hidden, Assignment(weights.float(), slots)))


def _replace_attention(modules: PreTrainedModel, model: MoeModel) -> None:
    for index, mixer in enumerate(model.mixers):
        layer = _decoder_layers(modules)[index]
        attention: Any = layer.get_submodule("self_attn")
        if isinstance(mixer, LatentAttention):
            layer.set_submodule("self_attn", LatentAttentionModule(attention, index, mixer))
        elif getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
            # The module would count tokens from the batch's first one.
            attention.attn_temperature_tuning = False
            attention.temperature = Temperature(attention.attn_scale, attention.floor_scale)


def _exact_tensors(modules: PreTrainedModel) -> frozenset[str]:
    """Names of those that stay float32 whatever the model computes in: because their module declares them so, or the
    family lists them. One of its lists transformers heeds in float16 alone; bfloat16 rounds by more."""
    kept = (*(modules._keep_in_fp32_modules or ()), *(modules._keep_in_fp32_modules_strict or ()))
    return frozenset(
        name
        for name, tensor in _tensors(modules)
        if tensor.dtype == torch.float32 or any(part in name for part in kept)
    )


def _load(
    modules: PreTrainedModel,
    checkpoint: Checkpoint,
    model: MoeModel,
    layout: AttentionLayout,
    exact: frozenset[str],
) -> None:
    """Reads every parameter. Raises CheckpointError for one that is missing or that the modules do not have."""
    kept = {name: tensor for name, tensor in model.dense.items() if name in exact}
    others = {name: tensor for name, tensor in model.dense.items() if name not in exact}
    tensors = {
        name: tensor
        for dense, dtype in ((kept, torch.float32), (others, layout.dtype))
        for name, tensor in read_dense(checkpoint, dense, dtype=dtype, device=layout.device)
    }
    strangers = modules.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if strangers:
        source = model.dense[strangers[0]].source
        raise CheckpointError(f"tensor {source} is not part of the model", field=source)
    modules.tie_weights()
    _rebuild_buffers(modules, layout.device)
    for name, tensor in _tensors(modules):
        tensor.requires_grad_(False)
        if tensor.device.type == "meta":
            raise CheckpointError(f"tensor {name} is missing", field=name)


def _rebuild_buffers(modules: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies are computed, not stored: after a build on meta they must be computed again."""
    for parent in list(modules.modules()):
        for name, child in parent.named_children():
            transient = child._non_persistent_buffers_set
            if any(child.get_buffer(buffer).device.type == "meta" for buffer in transient):
                try:
                    rebuilt = type(child)(config=getattr(child, "config", modules.config))
                except TypeError as error:
                    kind = type(child).__name__
                    raise Unsupported(f"model: {kind} cannot be computed anew", field="model") from error
                setattr(parent, name, rebuilt.to(device))


def _tensors(modules: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from modules.named_parameters()
    yield from modules.named_buffers()


def _decoder_layers(modules: PreTrainedModel) -> Any:
    """The layers of the decoder, where descriptions find them too; which parts they have is a matter of the family."""
    return modules.get_submodule("model.layers")

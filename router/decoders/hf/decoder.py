"""The transformers model of a checkpoint, with our parts in its three seams: attention, gate and experts.

The model is built on the meta device, and only the tensors of the router are read: experts never exist in this process.
Where the wiring of a family is known, our block replaces its own; any other family that uses the experts interface of
transformers keeps its gate, whose rows are then out of our reach. Where the lean decoder supports a model too, this one
is the reference that it must equal.

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
from router.decoders.hf.moe_block import CurrentStep, GateModule, MoeBlock, RemoteExperts, RemoteMlp
from router.decoders.hf.wiring import WIRINGS, Wiring
from router.gating.gate import Assignment, Gate
from router.gating.gate_stats import GateStats
from router.phase_clock import PhaseClock

EXPERTS_NAME = "moesaic_remote"


class HfDecoder:
    """A RouterModel of any family. Micro-batches pass one after the other, as a module tree cannot be left halfway."""

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
        self.gate_stats = GateStats.of(model)
        self._clock = clock
        self._mixers = model.mixers
        self._step = CurrentStep()
        self._modules = _build(checkpoint, model, num_positions, layout.dtype)
        exact = _exact_tensors(self._modules)
        _replace_blocks(self._modules, model, self._step, clock)
        _replace_attention(self._modules, model)
        _observe_gates(self._modules, model, self.gate_stats)
        _load(self._modules, checkpoint, model, layout, exact)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all tensors that this process holds."""
        return sum(tensor.nbytes for tensor in (*self._modules.parameters(), *self._modules.buffers()))

    @property
    def gates(self) -> dict[int, Gate]:
        found: dict[int, Gate] = {}
        for index, layer in enumerate(_decoder_layers(self._modules)):
            for module in layer.modules():
                if isinstance(module, GateModule):
                    found[index] = module.gate
        return found

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and returns the logits [N, V] of the wanted rows of each micro-batch in turn."""
        self.gate_stats.begin_step()
        return torch.cat([self._forward(micro_batch, cache) for micro_batch in micro_batches])

    def _forward(self, micro_batch: MicroBatch, cache: KVCache) -> torch.Tensor:
        self._step.micro_batch = micro_batch
        batch = micro_batch.batch
        output = self._modules(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=micro_batch.rows,
            step=AttentionStep(batch, cache, self._mixers, self._clock),
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
    """Replaces all experts in the modules by objects that call the workers."""
    wiring = WIRINGS.get(model.family, Wiring())
    layers = _decoder_layers(modules)
    for index, layer in sorted(model.experts.items()):
        remote = RemoteExperts(index, step)
        if layer.gate is None:
            layers[index].set_submodule(wiring.block, RemoteMlp(remote))
        elif layer.gate.own:
            _strip_experts(layers[index], remote)
        else:
            remote.observe_residual(layers[index])
            block = MoeBlock(layers[index].get_submodule(wiring.block), wiring, layer, remote, clock)
            layers[index].set_submodule(wiring.block, block)


def _strip_experts(layer: nn.Module, remote: RemoteExperts) -> None:
    """Removes the weights from the experts of a block that is kept; `_remote_experts` then computes them."""
    experts: Any = next(module for name, module in layer.named_modules() if name.split(".")[-1] == "experts")
    experts.remote = remote
    for name in list(experts._parameters):
        delattr(experts, name)


def _observe_gates(modules: PreTrainedModel, model: MoeModel, gate_stats: GateStats) -> None:
    """Finds the gate of each layer, ours or the family's own, by the shape of its rows. A projection of attention may
    have the same shape, so attention is left out."""
    layers = _decoder_layers(modules)
    for index in gate_stats.layers:
        experts = model.experts[index]
        rows = (experts.num_slots, experts.module.hidden_size)
        for name, module in layers[index].named_modules():
            weight = getattr(module, "weight", None)
            if (
                isinstance(weight, torch.Tensor)
                and weight.shape == rows
                and not name.startswith("self_attn.")
            ):
                gate_stats.observe_module(index, module)
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
            # The module would count positions from the first token of the batch.
            attention.attn_temperature_tuning = False
            attention.temperature = Temperature(attention.attn_scale, attention.floor_scale)


def _exact_tensors(modules: PreTrainedModel) -> frozenset[str]:
    """The names of the tensors that stay float32, whatever dtype the model computes in: their module declares them so, or
    the family lists them. transformers respects one of the two lists in float16 alone; bfloat16 rounds even more."""
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
    """Reads every parameter. Raises CheckpointError for one that is missing or that no module has."""
    _check_shapes(modules, model)
    tensors = read_dense(checkpoint, model.dense, dtype=layout.dtype, device=layout.device, exact=exact)
    loaded = modules.load_state_dict(dict(tensors), strict=False, assign=True)
    # What was loaded stays as it is: a head of its own is not tied, whatever the config says.
    modules.tie_weights(missing_keys=set(loaded.missing_keys), recompute_mapping=False)
    _rebuild_buffers(modules, layout.device)
    for name, tensor in _tensors(modules):
        tensor.requires_grad_(False)
        if tensor.device.type == "meta":
            raise CheckpointError(f"tensor {name} is missing", field=name)


def _check_shapes(modules: PreTrainedModel, model: MoeModel) -> None:
    """Refuses a tensor that no module has, or has in another shape, before any is read."""
    shapes = {name: tuple(tensor.shape) for name, tensor in modules.state_dict().items()}
    for name, tensor in model.dense.items():
        if name not in shapes:
            raise CheckpointError(f"tensor {tensor.source} is not part of the model", field=tensor.source)
        if shapes[name] != tensor.shape:
            raise CheckpointError(
                f"tensor {tensor.source} has shape {list(tensor.shape)}, its module has {list(shapes[name])}",
                field=tensor.source,
            )


def _rebuild_buffers(modules: PreTrainedModel, device: torch.device) -> None:
    """Computes rotary frequencies again: checkpoints do not store them, and a build on meta leaves them empty."""
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
    """The layers of the decoder, which all families keep under this name; the parts of a layer differ by family."""
    return modules.get_submodule("model.layers")

"""Families without a module of their own here: they run on the modules of transformers, gates included.

The names of tensors show which are experts, and their shapes show the sizes; every other tensor is the parameter of
transformers with the same name, except for the few that a family renames. As so little is known of a family, only those
in `_FAMILIES`, which have been compared with transformers, are served. All others are refused, if possible with the
config key that is the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    MAX_SLOTS,
    MLP_LAYOUTS,
    DecoderSizes,
    SizeCheck,
    assemble,
    expert_layout,
    read_decoder,
    read_layer_types,
    read_num_predictors,
)
from moesaic.families.deepseek import read_latent_attention
from moesaic.families.model import (
    Attention,
    DenseTensor,
    ExpertLayer,
    ExpertModule,
    GateRule,
    LatentAttention,
    Layout,
    Mixer,
    MoeModel,
    WeightPattern,
)
from moesaic.families.quantisation import SCALES

_SPARSE = blocks.LAYER + "block_sparse_moe."
_LAYOUTS: tuple[Layout, ...] = (
    *MLP_LAYOUTS,
    blocks.separate(_SPARSE + "experts.{slot}.", "w1", "w3", "w2"),
    blocks.fused(_SPARSE + "experts."),
    {
        "gate": WeightPattern(_SPARSE + "input_linear.weight", stacked=True, part=(0, 2)),
        "up": WeightPattern(_SPARSE + "input_linear.weight", stacked=True, part=(1, 2)),
        "down": WeightPattern(_SPARSE + "output_linear.weight", stacked=True),
    },
)

_NUM_SLOTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k")
_SINKS = "self_attn.sinks"
_FULL, _WINDOW = "full_attention", "sliding_attention"

NarrowLayers = Callable[[Config, int], Iterable[int]]


@dataclass(frozen=True, slots=True)
class _Family:
    """`narrow`: which layers have the window if the config does not list the layers' types. `latent`: attention is that of
    DeepSeek. `renamed`: parts of names in the files, and the names that transformers has for them."""

    narrow: NarrowLayers | None = None
    latent: bool = False
    renamed: tuple[tuple[str, str], ...] = ()


def _afmoe_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return _but_every(config.size("global_attn_every_n_layers"), num_layers)


def _cohere2_narrow(config: Config, num_layers: int) -> Iterator[int]:
    """The first dense layers have a pattern of their own, behind which that of the others begins anew."""
    num_dense = config.count("first_k_dense_replace", default=0)
    yield from _but_every(config.size("prefix_dense_sliding_window_pattern"), min(num_dense, num_layers))
    for layer in _but_every(config.size("sliding_window_pattern"), num_layers - num_dense):
        yield num_dense + layer


def _dots1_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return range(config.count("max_window_layers"), num_layers) if config.has("sliding_window") else ()


def _exaone_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return _but_every(config.size("sliding_window_pattern"), num_layers)


def _flint_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return (layer for layer in range(2, num_layers - 1) if layer % 4 != 1)


def _granite_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return (layer for layer in range(num_layers) if layer % 4)


def _kolibri_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return _but_every(5, num_layers)


def _mellum_narrow(config: Config, num_layers: int) -> Iterable[int]:
    return ()


def _but_every(step: int, num_layers: int) -> Iterable[int]:
    """All layers but every `step`-th one."""
    return (layer for layer in range(num_layers) if (layer + 1) % step)


_SHARED_GRANITE = (("block_sparse_moe.router.layer.", "block_sparse_moe.router."),)
_FAMILIES = {
    "afmoe": _Family(_afmoe_narrow),
    "cohere2_moe": _Family(_cohere2_narrow),
    "dots1": _Family(_dots1_narrow),
    "ernie4_5_moe": _Family(renamed=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),)),
    "exaone_moe": _Family(_exaone_narrow, renamed=((".mlp.e_score_", ".mlp.gate.e_score_"),)),
    "flint": _Family(_flint_narrow, renamed=((".self_attn.softmax_offset", ".self_attn.sinks"),)),
    "glm4_moe_lite": _Family(latent=True),
    "granitemoe_swa": _Family(_granite_narrow, renamed=_SHARED_GRANITE),
    "granitemoeshared": _Family(renamed=_SHARED_GRANITE),
    "hunyuan_v1_moe": _Family(),
    "hy_v3": _Family(
        renamed=(
            (".mlp.router.gate.", ".mlp.gate."),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
        )
    ),
    "kolibri1": _Family(
        _kolibri_narrow,
        renamed=(
            (".moe.router.expert_bias", ".mlp.gate.e_score_correction_bias"),
            (".post_attn_norm.", ".post_self_attn_layernorm."),
            (".post_ffn_norm.", ".post_mlp_layernorm."),
        ),
    ),
    "mellum": _Family(_mellum_narrow),
    "minimax_m2": _Family(renamed=((".block_sparse_moe.", ".mlp."),)),
    "solar_open": _Family(),
}
NAMES = frozenset(_FAMILIES)

# Config keys that show layers with a recurrent state, or attention that selects keys, with the reason of refusal.
_UNSERVED = {
    "text_config": "a model within a model is not served",
    "index_topk": "attention that chooses among keys is not served",
    "mamba_d_state": "state space layers are not served",
    "mamba_num_heads": "state space layers are not served",
    "conv_L_cache": "short convolutions are not served",
    "conv_kernel_size": "short convolutions are not served",
    "linear_conv_kernel_dim": "linear attention is not served",
    "linear_attn_config": "linear attention is not served",
    "attn_type_list": "lightning attention is not served",
}


def refuse_unserved(config: Config) -> None:
    """Raises CheckpointError, which names the key, if a model of any family has a feature that cannot be served."""
    kinds = config.values.get("layer_types")
    read_layer_types(config, len(kinds) if isinstance(kinds, list) else 0, _FULL, _WINDOW)
    for key, problem in _UNSERVED.items():
        if config.has(key):
            config.fail(key, problem)


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """A model of one of the families in `NAMES`."""
    refuse_unserved(config)
    name = str(config.values["model_type"])
    family = _FAMILIES[name]
    decoder = read_decoder(config)
    mixers = tuple(_mixers(checkpoint, config, decoder, family))
    model = assemble(
        checkpoint,
        config,
        decoder,
        family=name,
        mixers=mixers,
        experts=_read_experts(checkpoint, config, decoder),
        dense=(),
        size_checks=(("vocab_size", decoder.vocab_size, blocks.HEAD, 0), *_size_checks(mixers[0])),
        num_predictors=read_num_predictors(config),
    )
    return _with_dense(checkpoint, family, model)


def _read_experts(checkpoint: Checkpoint, config: Config, decoder: DecoderSizes) -> dict[int, ExpertLayer]:
    """The experts of the layers that have any."""
    sparse = _sparse_layers(checkpoint, decoder)
    layout, dtype = expert_layout(checkpoint, _LAYOUTS, sparse[0])
    first = layout["gate"]
    shape = checkpoint.tensors[first.name(sparse[0], 0)].shape
    inner_size = shape[-2] // first.part[1] if len(shape) > 1 else 0
    module = ExpertModule(decoder.hidden_size, inner_size, config.choice("hidden_act", ("silu",)))
    counts = _per_layer(config, config.first_present(_NUM_SLOTS), decoder.num_layers)
    top_k_key = config.first_present(_TOP_K)
    top_ks = _per_layer(config, top_k_key, decoder.num_layers)
    for layer in sparse:
        if top_ks[layer] > counts[layer]:
            config.fail(top_k_key, f"must be at most the number of experts, {counts[layer]}")
    return {
        layer: ExpertLayer(counts[layer], module, layout, dtype, GateRule(top_ks[layer], own=True))
        for layer in sparse
    }


def _per_layer(config: Config, key: str, num_layers: int) -> tuple[int, ...]:
    """A size for each layer. The config has one for all layers, or a list."""
    if not isinstance(config.values.get(key), list):
        return (config.size(key, most=MAX_SLOTS),) * num_layers
    sizes = config.sizes(key)[:num_layers]
    if len(sizes) < num_layers or not all(1 <= size <= MAX_SLOTS for size in sizes):
        config.fail(key, f"must have a number from 1 to {MAX_SLOTS} for each of {num_layers} layers")
    return sizes


def _sparse_layers(checkpoint: Checkpoint, decoder: DecoderSizes) -> tuple[int, ...]:
    """The layers that have experts. If there are none, the first layer, so that the error names one of its tensors."""
    firsts = [next(iter(layout.values())) for layout in _LAYOUTS]
    found = tuple(
        layer
        for layer in range(decoder.num_layers)
        if any(first.name(layer, 0) in checkpoint.tensors for first in firsts)
    )
    return found or (0,)


def _mixers(
    checkpoint: Checkpoint, config: Config, decoder: DecoderSizes, family: _Family
) -> Iterator[Attention | LatentAttention]:
    if family.latent:
        yield from (read_latent_attention(config),) * decoder.num_layers
        return
    attention = blocks.read_attention(config, decoder.hidden_size)
    kinds = read_layer_types(config, decoder.num_layers, _FULL, _WINDOW)
    if kinds is not None:
        narrow = {layer for layer, kind in enumerate(kinds) if kind == _WINDOW}
    else:
        narrow = set(family.narrow(config, decoder.num_layers)) if family.narrow else set()
    with_sinks = {
        name for name in (_module_name(name, family) for name in checkpoint.tensors) if name.endswith(_SINKS)
    }
    for layer in range(decoder.num_layers):
        yield replace(
            attention,
            window=config.size("sliding_window") if layer in narrow else None,
            sinks=blocks.LAYER.format(layer=layer) + _SINKS in with_sinks,
        )


def _size_checks(mixer: Mixer) -> Iterator[SizeCheck]:
    """The tensors that show the sizes of attention. The cache depends on these sizes, and the description of this model
    has no tensor that would show them."""
    prefix = blocks.LAYER.format(layer=0) + "self_attn."
    if isinstance(mixer, Attention):
        queries, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        yield "num_attention_heads", queries, prefix + "q_proj.weight", 0
        yield "num_key_value_heads", keys, prefix + "k_proj.weight", 0
    if isinstance(mixer, LatentAttention):
        rows = mixer.num_heads * (mixer.key_dim + mixer.value_dim)
        yield "kv_lora_rank", mixer.latent_dim, prefix + "kv_b_proj.weight", 1
        yield "num_attention_heads", rows, prefix + "kv_b_proj.weight", 0
        yield "qk_rope_head_dim", mixer.latent_dim + mixer.rotary_dim, prefix + "kv_a_proj_with_mqa.weight", 0


def _with_dense(checkpoint: Checkpoint, family: _Family, model: MoeModel) -> MoeModel:
    """The model with all tensors of the decoder that do not belong to experts, still without the scales of float8."""
    left = checkpoint.tensors.keys() - model.expert_tensors - model.ignored
    dense = {
        _module_name(name, family): DenseTensor(checkpoint.tensors[name].shape, name)
        for name in sorted(left)
        if name.startswith(("model.", "lm_head.")) and not name.endswith((SCALES, "rotary_emb.inv_freq"))
    }
    return replace(model, dense=dense)


def _module_name(name: str, family: _Family) -> str:
    for stored, known in family.renamed:
        name = name.replace(stored, known)
    return name

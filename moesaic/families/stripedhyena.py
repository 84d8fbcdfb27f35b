"""StripedHyena: each block has attention or a gated long convolution, and a gated MLP.

transformers does not have this family, so parameters have the names of the authors' own class. The files on the Hub have a
prefix before them, the standalone files do not. A config key that is not known here is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.mistral_params import MAX_LAYERS
from moesaic.families.blocks import Named
from moesaic.families.config import Config
from moesaic.families.model import (
    Attention,
    DenseTensor,
    ExpertLayer,
    ExpertModule,
    Hyena,
    Mixer,
    MoeModel,
    WeightPattern,
)
from moesaic.families.tensor_check import check_num_layers, check_sizes, stored_dtype
from moesaic.families.ties import resolve_ties

FAMILY = "stripedhyena"

EMBEDDING = "embedding_layer.weight"
NORM = "norm.scale"
HEAD = "unembed.weight"
BLOCK = "blocks.{layer}."
# The parameters of the MLP, by the weight of the expert that each becomes; the block's prefix precedes each name.
MLP = {"gate": "mlp.l1.weight", "up": "mlp.l2.weight", "down": "mlp.l3.weight"}

_PREFIXES = ("backbone.", "")
# Buffers that some files contain; all of them are computed, never read.
_COMPUTED = ("freq", "fftconv", "twiddle_factors", "_extra_state")
_TIME_BUFFER = "filter.t"

_READ = frozenset({
    "attn_layer_idxs", "column_split_hyena", "eps", "final_norm", "hidden_size", "hyena_filter_groups",
    "hyena_layer_idxs", "inner_mlp_size", "inner_size_multiple_of", "max_seqlen", "max_sequence_len",
    "mha_out_proj_bias", "mlp_activation", "model_parallel_size", "model_type", "num_attention_heads",
    "num_layers", "proj_groups", "qkv_proj_bias", "rotary_emb_base", "rotary_emb_scaling_factor",
    "short_filter_bias", "short_filter_length", "smeared_gqa", "state_size", "tie_embeddings",
    "use_flash_rmsnorm", "use_interpolated_rotary_pos_emb", "vocab_size",
})  # fmt: skip
# Keys that affect how the authors' code computes or was trained, but not its result. Their `prefill_style` recurrence
# is wrong for complex poles; both styles mean the same model.
_HARMLESS = frozenset({
    "architectures", "attn_block_dtype", "auto_map", "bos_token_id", "column_split", "compile", "dtype",
    "eos_token_id", "hyena_block_dtype", "id2label", "inference_mode", "initializer_range", "label2id",
    "log_intermediate_values", "long_fir_threshold", "low_mem_mode", "make_vocab_size_divisible_by",
    "max_batch_size", "mlp_dtype", "mlp_init_method", "mlp_output_init_method", "model_name", "num_filters",
    "output_attentions", "output_hidden_states", "pad_token_id", "params_dtype", "pile_parallel_size",
    "pipe_parallel_size", "prefill_style", "return_dict", "rng_fork", "split_k0", "tie_word_embeddings",
    "tokenizer_type", "torch_dtype", "transformers_version", "use_cache", "use_flash_attention_2",
    "use_flash_attn", "use_flash_depthwise", "use_flashfft", "use_laughing_hyena", "vocab_file",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The constants of the forward pass."""

    norm_eps: float
    # Whether the norm adds `norm_eps` to the mean of squares, or to its root.
    eps_inside_root: bool
    rotary_base: float
    # Positions are divided by this number.
    rotary_scaling: float
    # Whether the channels of x2, x1 and v are stored head by head.
    split_by_head: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StripedHyenaModel(MoeModel):
    """A MoeModel with the arithmetic of its decoder."""

    arithmetic: Arithmetic


def read_arithmetic(config: Config) -> Arithmetic:
    interpolated = config.flag("use_interpolated_rotary_pos_emb", default=False)
    return Arithmetic(
        norm_eps=_required(config, "eps"),
        eps_inside_root=config.flag("use_flash_rmsnorm", default=False),
        rotary_base=_required(config, "rotary_emb_base"),
        rotary_scaling=config.number("rotary_emb_scaling_factor", default=1.0) if interpolated else 1.0,
        split_by_head=config.flag("column_split_hyena", default=True),
        activation=config.choice("mlp_activation", ("silu", "gelu")),
    )


def describe(checkpoint: Checkpoint, config: Config) -> StripedHyenaModel:
    _refuse_unknown(config)
    # The constants are read first so that errors in them are found before those in tensors.
    arithmetic = read_arithmetic(config)
    hidden_size, num_layers = config.size("hidden_size"), config.size("num_layers", most=MAX_LAYERS)
    vocab_size, tied = config.size("vocab_size"), config.flag("tie_embeddings", default=False)
    prefix = next((p for p in _PREFIXES if p + EMBEDDING in checkpoint.tensors), _PREFIXES[0])
    mixers = _mixers(config, hidden_size, num_layers)
    experts = _experts(checkpoint, config, prefix, hidden_size, arithmetic.activation)
    check_sizes(
        checkpoint,
        config,
        (
            ("vocab_size", vocab_size, prefix + EMBEDDING, 0),
            ("hidden_size", hidden_size, prefix + EMBEDDING, 1),
            ("inner_mlp_size", experts.module.inner_size, experts.layout["gate"].name(0, 0), 0),
            *(
                ("state_size", mixer.state_size, f"{prefix}{BLOCK.format(layer=layer)}filter.poles", 1)
                for layer, mixer in enumerate(mixers)
                if isinstance(mixer, Hyena)
            ),
        ),
    )
    check_num_layers(checkpoint, config, "num_layers", num_layers, prefix + BLOCK)
    dense = dict(_ends(hidden_size, vocab_size))
    for layer, mixer in enumerate(mixers):
        dense |= _block(config, BLOCK.format(layer=layer), mixer, hidden_size)
    model = StripedHyenaModel(
        arithmetic=arithmetic,
        family=FAMILY,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        max_model_len=config.size("max_seqlen", "max_sequence_len"),
        dtype=experts.dtype,
        mixers=mixers,
        experts=dict.fromkeys(range(num_layers), experts),
        dense={name: DenseTensor(tensor.shape, prefix + name) for name, tensor in dense.items()},
        ties=(EMBEDDING, HEAD) if tied else (),
        ignored=frozenset(name for name in checkpoint.tensors if _is_computed(name)),
    )
    model = resolve_ties(checkpoint, model)
    if model.untied:
        # Where both are stored, the authors' class keeps whichever it reads last.
        config.fail(
            "tie_embeddings", f"is true, but tensor {prefix + HEAD} differs from {prefix + EMBEDDING}"
        )
    return model


def _refuse_unknown(config: Config) -> None:
    for key in sorted(config.values):
        if key not in _READ and key not in _HARMLESS and not key.startswith("_"):
            config.fail(key, "is not known of a StripedHyena")
    if config.size("hyena_filter_groups", default=1) != 1:
        config.fail("hyena_filter_groups", "must be 1: filters that channels share are not served")
    if not config.flag("final_norm", default=True):
        config.fail("final_norm", "must be true")


def _required(config: Config, key: str) -> float:
    if not config.has(key):
        config.fail(key, "is missing")
    return config.number(key, default=0.0)


def _inner_size(config: Config, hidden_size: int) -> int:
    """The inner size of the MLP: as given, or 8/3 of the hidden size, rounded up to a multiple."""
    given = config.optional_size("inner_mlp_size")
    if given is not None:
        return given
    multiple = config.size("inner_size_multiple_of", default=64) * config.size(
        "model_parallel_size", default=1
    )
    return -(-(8 * hidden_size // 3) // multiple) * multiple


def _mixers(config: Config, hidden_size: int, num_layers: int) -> tuple[Mixer, ...]:
    num_heads, groups = config.size("num_attention_heads"), config.size("proj_groups", default=1)
    if hidden_size % num_heads:
        config.fail("num_attention_heads", "must divide hidden_size")
    if hidden_size // num_heads % 2:
        config.fail("num_attention_heads", "must give heads of an even size, for rotary pairs")
    if num_heads % groups:
        config.fail("proj_groups", "must divide num_attention_heads")
    num_kv_heads = num_heads if config.flag("smeared_gqa", default=False) else num_heads // groups
    attention = Attention(num_heads, num_kv_heads, hidden_size // num_heads)
    hyena = Hyena(config.size("state_size"), config.size("short_filter_length"), num_heads)
    attends, convolves = config.sizes("attn_layer_idxs"), config.sizes("hyena_layer_idxs")
    if attends and max(attends) >= num_layers:
        config.fail("attn_layer_idxs", f"names layer {max(attends)} of {num_layers}")
    # The list may name layers beyond the last one: that of the published file does.
    if missing := sorted(set(range(num_layers)).difference(attends, convolves)):
        config.fail("hyena_layer_idxs", f"layer {missing[0]} is in neither this nor attn_layer_idxs")
    return tuple(attention if layer in attends else hyena for layer in range(num_layers))


def _experts(
    checkpoint: Checkpoint, config: Config, prefix: str, hidden_size: int, activation: str
) -> ExpertLayer:
    """The MLP of a block, as the layer's one expert."""
    inner_size = _inner_size(config, hidden_size)
    return ExpertLayer(
        num_slots=1,
        module=ExpertModule(hidden_size, inner_size, activation),
        layout={weight: WeightPattern(prefix + BLOCK + name) for weight, name in MLP.items()},
        dtype=stored_dtype(checkpoint, prefix + BLOCK.format(layer=0) + MLP["gate"]),
        gate=None,
        parameters={weight: BLOCK + name for weight, name in MLP.items()},
    )


def _ends(hidden_size: int, vocab_size: int) -> Named:
    yield EMBEDDING, DenseTensor((vocab_size, hidden_size), EMBEDDING)
    yield NORM, DenseTensor((hidden_size,), NORM)
    yield HEAD, DenseTensor((vocab_size, hidden_size), HEAD)


def _block(config: Config, block: str, mixer: Mixer, hidden_size: int) -> Named:
    for name in ("pre_norm", "post_norm"):
        yield _own(f"{block}{name}.scale", hidden_size)
    if isinstance(mixer, Hyena):
        yield from _hyena(config, block, mixer, hidden_size)
    elif isinstance(mixer, Attention):
        yield from _attention(config, block + "inner_mha_cls.", mixer, hidden_size)


def _attention(config: Config, prefix: str, mixer: Attention, hidden_size: int) -> Named:
    """The rows of Wqkv are those of all query heads, then of all key heads, then of all value heads."""
    rows = (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    for name, size, bias in (
        ("Wqkv", rows, "qkv_proj_bias"),
        ("out_proj", hidden_size, "mha_out_proj_bias"),
    ):
        yield _own(f"{prefix}{name}.weight", size, hidden_size)
        if config.flag(bias, default=False):
            yield _own(f"{prefix}{name}.bias", size)


def _hyena(config: Config, block: str, mixer: Hyena, hidden_size: int) -> Named:
    """Poles and residues are pairs of real and imaginary parts."""
    for name, size in (("projections", 3 * hidden_size), ("out_filter_dense", hidden_size)):
        yield _own(f"{block}{name}.weight", size, hidden_size)
        yield _own(f"{block}{name}.bias", size)
    yield _own(f"{block}filter.short_filter_weight", 3 * hidden_size, 1, mixer.short_filter)
    if config.flag("short_filter_bias", default=True):
        yield _own(f"{block}filter.short_filter_bias", 3 * hidden_size)
    yield _own(f"{block}filter.D", hidden_size)
    for name in ("poles", "residues"):
        yield _own(f"{block}filter.{name}", hidden_size, mixer.state_size, 1, 2)


def _own(name: str, *shape: int) -> tuple[str, DenseTensor]:
    return name, DenseTensor(shape, name)


def _is_computed(name: str) -> bool:
    return name.endswith(_TIME_BUFFER) or any(word in name for word in _COMPUTED)

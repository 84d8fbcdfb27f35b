"""Switch Transformers, built like T5, and ST-MoE, which has the same tensors and another gate.

`num_selected_experts` 2 in a config means ST-MoE, for which no layout of its own is published: each token gets the two
best slots, their scores divided by the sum of both, and `second_expert_policy` decides when the second one is dropped.
Its other keys: `second_expert_threshold`, `eval_capacity_factor`, `min_expert_capacity`, `expert_group_size`.
"""

from __future__ import annotations

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.mistral_params import MAX_LAYERS
from moesaic.families.config import Config
from moesaic.families.decoder import MAX_SLOTS
from moesaic.families.encoder_decoder import (
    ACTIVATIONS,
    Arithmetic,
    Names,
    RelativePositions,
    Sizes,
    Stack,
    StackNames,
    assemble,
    read_start_token,
)
from moesaic.families.model import Capacity, GateRule, MoeModel

FAMILY = "switch_transformers"

NAMES = Names(
    encoder=StackNames(
        block="encoder.block.{block}.",
        attention="layer.0.SelfAttention.",
        attention_norm="layer.0.layer_norm",
        mlp="layer.1.mlp.",
        mlp_norm="layer.1.layer_norm",
        norm="encoder.final_layer_norm",
        embedding="encoder.embed_tokens.weight",
    ),
    decoder=StackNames(
        block="decoder.block.{block}.",
        attention="layer.0.SelfAttention.",
        attention_norm="layer.0.layer_norm",
        cross="layer.1.EncDecAttention.",
        cross_norm="layer.1.layer_norm",
        mlp="layer.2.mlp.",
        mlp_norm="layer.2.layer_norm",
        norm="decoder.final_layer_norm",
        embedding="decoder.embed_tokens.weight",
    ),
    shared="shared.weight",
    head="lm_head.weight",
    tied=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    projections=("q", "k", "v", "o"),
    up="wi",
    down="wo",
)

# The length that the family was trained with; relative positions have no limit of their own.
_DEFAULT_POSITIONS = 512
_SECOND_EPSILON = 1e-9
# A threshold that no weight of a second slot exceeds.
_NEVER = 1.0


def read_arithmetic(config: Config) -> Arithmetic:
    relative = RelativePositions(
        config.size("relative_attention_num_buckets"),
        config.size("relative_attention_max_distance"),
    )
    # An encoder divides its buckets by four: before and after the query, near and far.
    if relative.num_buckets % 4:
        config.fail("relative_attention_num_buckets", "must be a multiple of four")
    if relative.max_distance <= relative.num_buckets // 2:
        config.fail("relative_attention_max_distance", "must be above half of relative_attention_num_buckets")
    vocab_size, padding_token = config.size("vocab_size"), config.count("pad_token_id")
    return Arithmetic(
        norm_eps=config.number("layer_norm_epsilon"),
        centred=False,
        start_token=read_start_token(config, vocab_size, padding_token),
        embedding_scale=1.0,
        logits_scale=config.size("d_model") ** -0.5 if _is_tied(config) else 1.0,
        relative=relative,
        padding_token=padding_token,
        activation=config.choice("dense_act_fn", ACTIVATIONS),
    )


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    if config.flag("is_gated_act", default=False):
        config.fail("is_gated_act", "must be false: experts with a gated branch have no known layout")
    config.choice("router_dtype", ("float32",))
    num_layers = config.size("num_layers", most=MAX_LAYERS)
    num_decoder_layers = config.size("num_decoder_layers", default=num_layers, most=MAX_LAYERS)
    heads, head_dim = config.size("num_heads"), config.size("d_kv")
    inner_size, num_slots = config.size("d_ff"), config.size("num_experts", most=MAX_SLOTS)
    top_k = config.size("num_selected_experts", default=1)
    if top_k > min(2, num_slots):
        config.fail("num_selected_experts", f"must be 1 or 2, and at most num_experts, {num_slots}")
    sparse = (_sparse(config, "encoder", num_layers), _sparse(config, "decoder", num_decoder_layers))
    sizes = Sizes(
        hidden_size=config.size("d_model"),
        vocab_size=config.size("vocab_size"),
        max_model_len=2 * config.size("n_positions", default=_DEFAULT_POSITIONS),
        num_slots=num_slots,
        encoder=Stack(heads, head_dim, inner_size, sparse[0]),
        decoder=Stack(heads, head_dim, inner_size, sparse[1]),
        tied=_is_tied(config),
        encoder_key="num_layers",
        decoder_key="num_decoder_layers",
    )
    gate, capacity = _switch(config) if top_k == 1 else _st_moe(config)
    return assemble(
        checkpoint,
        config,
        sizes,
        NAMES,
        read_arithmetic(config),
        family=FAMILY,
        gate=gate,
        capacity=capacity,
    )


def _switch(config: Config) -> tuple[GateRule, Capacity]:
    """Switch: the best slot, weighted by its score. Tokens are counted over each sequence."""
    size = config.size("expert_capacity")
    gate = GateRule(1, biased=config.flag("router_bias"))
    return gate, Capacity("fixed", size, counted="sequence")


def _st_moe(config: Config) -> tuple[GateRule, Capacity]:
    """ST-MoE. Where training drew at random whether a token gets its second slot, the token gets it exactly where that
    draw could not have failed: above the threshold."""
    policy = config.choice("second_expert_policy", ("random", "threshold", "all", "none"))
    threshold = config.number("second_expert_threshold", default=0.2)
    gate = GateRule(
        2,
        renormalise=True,
        epsilon=_SECOND_EPSILON,
        second_threshold={"all": None, "none": _NEVER}.get(policy, threshold),
        biased=config.flag("router_bias"),
    )
    capacity = Capacity(
        "factor",
        config.number("eval_capacity_factor", default=2.0),
        min_tokens=config.size("min_expert_capacity", default=4),
        group_size=config.size("expert_group_size", default=1024),
        count_kept_only=True,
    )
    return gate, capacity


def _is_tied(config: Config) -> bool:
    return config.flag("tie_word_embeddings")


def _sparse(config: Config, side: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers have several experts: every `step`-th one from the second on, or all of them if `step` is one."""
    num_sparse = config.count(f"num_sparse_{side}_layers")
    step = config.count(f"{side}_sparse_step", default=num_layers // num_sparse if num_sparse else num_layers)
    return tuple(step == 1 or (step > 0 and layer % step == 1) for layer in range(num_layers))

"""DeepSeek-V2 and DeepSeek-V3: attention over one compressed vector per token, dense first layers, shared experts in
addition to the routed ones, and a gate that first chooses among groups of experts.

V2 scores by softmax and keeps the groups with the best expert. V3 scores by sigmoid, adds a bias that takes part in the
choice but not in the weights, and keeps the groups with the best two experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    MLP,
    Slots,
    assemble,
    layers_behind_dense,
    read_channels,
    read_decoder,
    read_num_predictors,
    read_slots,
)
from moesaic.families.model import GateRule, Groups, LatentAttention, MoeModel

# Added to the sum of scores, so that a sum of zero does not divide.
_EPSILON = 1e-20


def describe_v2(checkpoint: Checkpoint, config: Config) -> MoeModel:
    slots = _read_slots(config)
    config.choice("scoring_func", ("softmax",))
    if config.flag("norm_topk_prob"):
        config.fail("norm_topk_prob", "true is not served: implementations of this family disagree about it")
    if config.flag("mlp_bias"):
        config.fail("mlp_bias", "true is not served: experts of this family have no biases")
    limited = config.choice("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy"
    rule = GateRule(
        slots.top_k,
        groups=_read_groups(config, slots, best=1) if limited else None,
        scale=config.number("routed_scaling_factor"),
    )
    return _describe(checkpoint, config, "deepseek_v2", slots, rule)


def describe_v3(checkpoint: Checkpoint, config: Config) -> MoeModel:
    slots = _read_slots(config)
    config.choice("scoring_func", ("sigmoid",))
    config.choice("topk_method", ("noaux_tc",))
    rule = sigmoid_rule(config, slots)
    return _describe(checkpoint, config, "deepseek_v3", slots, rule)


def sigmoid_rule(config: Config, slots: Slots) -> GateRule:
    """The gate rule of DeepSeek-V3, which other families have adopted."""
    return GateRule(
        slots.top_k,
        score="sigmoid",
        selection_bias=True,
        groups=_read_groups(config, slots, best=2),
        renormalise=config.flag("norm_topk_prob"),
        epsilon=_EPSILON,
        scale=config.number("routed_scaling_factor"),
    )


def _read_groups(config: Config, slots: Slots, *, best: int) -> Groups | None:
    """The groups of slots, or None if there is only one."""
    count, keep = config.size("n_group"), config.size("topk_group")
    if slots.count % count or slots.count // count < best:
        config.fail("n_group", f"must divide {slots.key}, {slots.count}, into groups of at least {best}")
    if keep > count:
        config.fail("topk_group", f"must be at most n_group, {count}")
    if keep * (slots.count // count) < slots.top_k:
        config.fail("topk_group", "keeps fewer experts than num_experts_per_tok")
    return Groups(count, keep, best) if count > 1 else None


def shared_experts(prefix: str, hidden_size: int, inner_size: int) -> blocks.Named:
    return blocks.mlp_tensors(prefix + "shared_experts.", hidden_size, inner_size)


def _read_slots(config: Config) -> Slots:
    if config.size("moe_layer_freq", default=1) != 1:
        config.fail("moe_layer_freq", "must be 1: after the dense layers all have experts")
    return read_slots(config, "n_routed_experts", "num_local_experts", "num_experts")


def _describe(
    checkpoint: Checkpoint,
    config: Config,
    family: str,
    slots: Slots,
    rule: GateRule,
) -> MoeModel:
    decoder = read_decoder(config)
    hidden_size = decoder.hidden_size
    sparse = layers_behind_dense(config, decoder.num_layers)
    channels = read_channels(checkpoint, config, decoder, slots, rule, sparse)
    attention = read_latent_attention(config)
    shared_size = config.size("n_shared_experts") * channels.module.inner_size

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            prefix = blocks.LAYER.format(layer=layer)
            yield blocks.norms(prefix, hidden_size, "input_layernorm", "post_attention_layernorm")
            yield _attention(prefix + "self_attn.", config, attention, hidden_size)
            if layer in sparse:
                yield gate(layer, slots.count, hidden_size, rule)
                yield shared_experts(prefix + "mlp.", hidden_size, shared_size)

    return assemble(
        checkpoint,
        config,
        decoder,
        family=family,
        mixers=(attention,) * decoder.num_layers,
        experts=channels.layers,
        dense=dense(),
        size_checks=channels.size_checks,
        num_predictors=read_num_predictors(config),
    )


def gate(layer: int, num_slots: int, hidden_size: int, rule: GateRule) -> blocks.Named:
    prefix = MLP.format(layer=layer) + "gate."
    yield blocks.tensor(prefix + "weight", num_slots, hidden_size)
    if rule.selection_bias:
        yield blocks.tensor(prefix + "e_score_correction_bias", num_slots)


def read_latent_attention(config: Config) -> LatentAttention:
    return LatentAttention(
        num_heads=config.size("num_attention_heads"),
        latent_dim=config.size("kv_lora_rank"),
        rotary_dim=config.size("qk_rope_head_dim"),
        key_dim=config.size("qk_nope_head_dim"),
        value_dim=config.size("v_head_dim"),
    )


def _attention(prefix: str, config: Config, attention: LatentAttention, hidden_size: int) -> blocks.Named:
    """Queries are computed from the hidden state directly, or through a compressed vector of their own."""
    heads, latent = attention.num_heads, attention.latent_dim
    queries = heads * (attention.key_dim + attention.rotary_dim)
    bias = config.flag("attention_bias")
    query_rank = config.optional_size("q_lora_rank")
    if query_rank is None:
        yield blocks.tensor(prefix + "q_proj.weight", queries, hidden_size)
    else:
        yield from _linear(prefix + "q_a_proj", query_rank, hidden_size, bias=bias)
        yield blocks.tensor(prefix + "q_a_layernorm.weight", query_rank)
        yield blocks.tensor(prefix + "q_b_proj.weight", queries, query_rank)
    rows = latent + attention.rotary_dim
    yield from _linear(prefix + "kv_a_proj_with_mqa", rows, hidden_size, bias=bias)
    yield blocks.tensor(prefix + "kv_a_layernorm.weight", latent)
    yield blocks.tensor(
        prefix + "kv_b_proj.weight", heads * (attention.key_dim + attention.value_dim), latent
    )
    yield from _linear(prefix + "o_proj", hidden_size, heads * attention.value_dim, bias=bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> blocks.Named:
    yield blocks.tensor(name + ".weight", rows, columns)
    if bias:
        yield blocks.tensor(name + ".bias", rows)

"""NLLB-MoE: a translation model with biases in all projections and sinusoidal positions, in the layout of transformers."""

from __future__ import annotations

import math
from functools import partial

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.mistral_params import MAX_LAYERS
from moesaic.families.config import Config
from moesaic.families.decoder import MAX_SLOTS
from moesaic.families.encoder_decoder import (
    ACTIVATIONS,
    Arithmetic,
    Names,
    Sizes,
    Stack,
    StackNames,
    assemble,
    read_start_token,
)
from moesaic.families.model import Capacity, GateRule, MoeModel

FAMILY = "nllb-moe"

NAMES = Names(
    encoder=StackNames(
        block="model.encoder.layers.{block}.",
        attention="self_attn.",
        attention_norm="self_attn_layer_norm",
        mlp="ffn.",
        mlp_norm="ff_layer_norm",
        norm="model.encoder.layer_norm",
        embedding="model.encoder.embed_tokens.weight",
    ),
    decoder=StackNames(
        block="model.decoder.layers.{block}.",
        attention="self_attn.",
        attention_norm="self_attn_layer_norm",
        cross="cross_attention.",
        cross_norm="cross_attention_layer_norm",
        mlp="ffn.",
        mlp_norm="ff_layer_norm",
        norm="model.decoder.layer_norm",
        embedding="model.decoder.embed_tokens.weight",
    ),
    shared="model.shared.weight",
    head="lm_head.weight",
    tied=("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    projections=("q_proj", "k_proj", "v_proj", "out_proj"),
    up="fc1",
    down="fc2",
    computed=("model.encoder.embed_positions.weights", "model.decoder.embed_positions.weights"),
)

_NORM_EPS = 1e-5
_DRAWN = "would choose the experts of a token at random; served: all, sampling (without its noise)"


def read_arithmetic(config: Config) -> Arithmetic:
    hidden_size, vocab_size = config.size("d_model"), config.size("vocab_size")
    if hidden_size < 4 or hidden_size % 2:
        config.fail("d_model", "must be even and at least 4, for sines and cosines of its positions")
    return Arithmetic(
        norm_eps=_NORM_EPS,
        centred=True,
        start_token=read_start_token(config, vocab_size, 2),
        embedding_scale=math.sqrt(hidden_size) if config.flag("scale_embedding") else 1.0,
        logits_scale=1.0,
        relative=None,
        padding_token=config.count("pad_token_id"),
        activation=config.choice("activation_function", ACTIVATIONS),
    )


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    config.choice("router_dtype", ("float32",))
    hidden_size, num_slots = config.size("d_model"), config.size("num_experts", most=MAX_SLOTS)
    if num_slots < 2:
        config.fail("num_experts", "must be at least 2: each token is given two")
    sizes = Sizes(
        hidden_size=hidden_size,
        vocab_size=config.size("vocab_size"),
        # Source and target together; each may have this number of positions.
        max_model_len=2 * config.size("max_position_embeddings"),
        num_slots=num_slots,
        encoder=_stack(config, "encoder", hidden_size),
        decoder=_stack(config, "decoder", hidden_size),
        tied=config.flag("tie_word_embeddings"),
        encoder_key="encoder_layers",
        decoder_key="decoder_layers",
    )
    return assemble(
        checkpoint,
        config,
        sizes,
        NAMES,
        read_arithmetic(config),
        family=FAMILY,
        gate=_gate(config),
        capacity=_capacity(config),
    )


def _stack(config: Config, side: str, hidden_size: int) -> Stack:
    num_layers, heads = config.size(f"{side}_layers", most=MAX_LAYERS), config.size(f"{side}_attention_heads")
    if hidden_size % heads:
        config.fail(f"{side}_attention_heads", f"must divide d_model, {hidden_size}")
    step = config.count(f"{side}_sparse_step")
    sparse = tuple(step > 0 and (layer + 1) % step == 0 for layer in range(num_layers))
    return Stack(heads, hidden_size // heads, config.size(f"{side}_ffn_dim"), sparse)


def _gate(config: Config) -> GateRule:
    """The gate, whose weights are scaled by the share of tokens that training did not drop."""
    policy = config.choice("second_expert_policy", ("all", "sampling", "random"))
    if policy == "random":
        config.fail("second_expert_policy", f"'random' {_DRAWN}")
    dropout = config.values.get("moe_token_dropout", 0.2)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        config.fail("moe_token_dropout", "must be a number from 0 to below 1")
    return GateRule(2, renormalise=True, scale=1 - dropout, biased=config.flag("router_bias"))


def _capacity(config: Config) -> Capacity:
    fraction = config.values.get("moe_eval_capacity_token_fraction", 1.0)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not fraction <= 1:
        config.fail("moe_eval_capacity_token_fraction", "must be a number up to 1")
    capacity = partial(
        Capacity,
        batch_prioritised=config.flag("batch_prioritized_routing"),
        renormalise_first=config.flag("normalize_router_prob_before_dropping"),
    )
    if fraction > 0:
        return capacity("fraction", float(fraction))
    if not config.has("expert_capacity"):
        return capacity("even")
    return capacity("fixed", config.size("expert_capacity"))

"""What a step cannot be faster than: the bytes that it reads over the memory's rate, the products over the processor's.

Uniform routing: a token takes K of the E experts of a layer, each set alike likely. Of b tokens that makes
E (1 - (1 - K/E)^b) distinct experts, each of whose weights are read once.
"""

from __future__ import annotations

from random_checkpoint import Shape

from harness.weights import expert_parameters, router_parameters


def distinct_experts(shape: Shape, tokens: int) -> float:
    """Experts of one layer that at least one of the tokens takes, on average."""
    missed = (1 - shape.experts_per_token / shape.experts) ** tokens
    return shape.experts * (1 - missed)


def token_cache_bytes(shape: Shape, item_bytes: int) -> int:
    """Keys and values of one token, over all layers."""
    return 2 * shape.layers * shape.hidden // shape.heads * shape.kv_heads * item_bytes


def weight_bytes(shape: Shape, tokens: int, item_bytes: int) -> float:
    """Weights that a step of so many tokens reads."""
    experts = shape.layers * distinct_experts(shape, tokens) * expert_parameters(shape)
    return item_bytes * (experts + router_parameters(shape))


def decode_bytes(shape: Shape, batch: int, context: int, item_bytes: int) -> float:
    """Bytes that a step reads in which `batch` sequences, each `context` tokens long, write one token."""
    return weight_bytes(shape, batch, item_bytes) + batch * context * token_cache_bytes(shape, item_bytes)


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Operations that reading a prompt takes, a multiplication and an addition being two; one token meets the head."""
    head = shape.vocabulary * shape.hidden
    of_token = (
        router_parameters(shape) - head + shape.layers * shape.experts_per_token * expert_parameters(shape)
    )
    attention = 2 * shape.layers * shape.hidden * tokens**2  # scores and values, half of each is masked
    return 2 * (of_token * tokens + head) + attention


def prefill_floor_s(
    shape: Shape, tokens: int, item_bytes: int, *, bytes_per_s: float, flops_per_s: float
) -> float:
    """Seconds; many tokens are bound by the products, few by the weights."""
    reading_s = weight_bytes(shape, tokens, item_bytes) / bytes_per_s
    return max(reading_s, prefill_flops(shape, tokens) / flops_per_s)

"""Lower bounds of a step's time: its bytes over the memory's rate, its products over the processor's.

Routing is taken as uniform: a token takes K of the E experts of a layer, and all sets of K are equally
likely. Then b tokens take E (1 - (1 - K/E)^b) distinct experts on average, and the weights of each are read
once.
"""

from __future__ import annotations

from random_checkpoint import Shape


def router_parameters(shape: Shape) -> int:
    """What a step of one token reads: attention, gates, norms, the head, one row of the embedding."""
    kv_width = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * kv_width + (shape.experts + 2) * shape.hidden
    return shape.layers * layer + (shape.vocabulary + 2) * shape.hidden


def expert_parameters(shape: Shape) -> int:
    return 3 * shape.hidden * shape.inner


def distinct_experts(shape: Shape, tokens: int) -> float:
    """The average number of experts of one layer that at least one of the tokens takes."""
    missed = (1 - shape.experts_per_token / shape.experts) ** tokens
    return shape.experts * (1 - missed)


def token_cache_bytes(shape: Shape, item_bytes: int) -> int:
    """The size of the keys and values of one token, over all layers."""
    return 2 * shape.layers * shape.hidden // shape.heads * shape.kv_heads * item_bytes


def weight_bytes(shape: Shape, tokens: int, item_bytes: int) -> float:
    """The bytes of weights that a step of `tokens` tokens reads."""
    experts = shape.layers * distinct_experts(shape, tokens) * expert_parameters(shape)
    return item_bytes * (experts + router_parameters(shape))


def decode_bytes(shape: Shape, batch: int, context: int, item_bytes: int) -> float:
    """The bytes that a step reads in which `batch` sequences, each `context` tokens long, write one token."""
    return weight_bytes(shape, batch, item_bytes) + batch * context * token_cache_bytes(shape, item_bytes)


def prefill_flops(shape: Shape, tokens: int) -> float:
    """The operations of reading a prompt, a multiply-add being two; the head is applied to one token."""
    head = shape.vocabulary * shape.hidden
    of_token = (
        router_parameters(shape) - head + shape.layers * shape.experts_per_token * expert_parameters(shape)
    )
    attention = 2 * shape.layers * shape.hidden * tokens**2  # scores and values, of which half is masked
    return 2 * (of_token * tokens + head) + attention


def prefill_floor_s(
    shape: Shape, tokens: int, item_bytes: int, *, bytes_per_s: float, flops_per_s: float
) -> float:
    """Seconds; a long prompt is bound by the products, a short one by the weights."""
    reading_s = weight_bytes(shape, tokens, item_bytes) / bytes_per_s
    return max(reading_s, prefill_flops(shape, tokens) / flops_per_s)

"""The number of parameters of a Mixtral that the router reads in a step, and the number that an expert has."""

from __future__ import annotations

from random_checkpoint import Shape


def router_parameters(shape: Shape) -> int:
    """The parameters read by a step of one token: attention, gates, norms, the head, one row of the embedding."""
    kv_width = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * kv_width + (shape.experts + 2) * shape.hidden
    return shape.layers * layer + (shape.vocabulary + 2) * shape.hidden


def expert_parameters(shape: Shape) -> int:
    return 3 * shape.hidden * shape.inner

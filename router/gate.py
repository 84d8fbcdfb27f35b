"""The gate of a layer: scores every expert for every token and keeps the best, by the family's rule as data.

Shapes: T tokens, E experts (slots), K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moesaic.families import GateRule

# From this many scores on it is faster to find the best of a row than to sort all of it.
_SORTED_SCORES = 2048
_SCORE_BITS = 32


class Assignment(NamedTuple):
    """Which slots compute each token, best first, and with which weights."""

    weights: torch.Tensor  # [T, K], float32
    slots: torch.Tensor  # [T, K], int64


def assign(logits: torch.Tensor, rule: GateRule) -> Assignment:
    """Softmax over all slots [T, E] in float32, the top k of them, the lowest slot first where scores tie."""
    scores = logits.float().softmax(dim=-1)
    weights, slots = _best(scores, rule.top_k)
    if rule.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Assignment(weights, slots)


def _best(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    # torch.topk promises no order among equals: a stable sort does, and so do keys of which no two are equal.
    if scores.numel() <= _SORTED_SCORES:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        return ranked[:, :top_k], order[:, :top_k]
    last_slot = scores.shape[1] - 1
    backwards = torch.arange(last_slot, -1, -1, device=scores.device)
    # Floats from zero up are ordered as their bits are.
    keys = scores.view(torch.int32).long().bitwise_left_shift_(_SCORE_BITS).bitwise_or_(backwards)
    best = keys.topk(top_k, dim=-1).values
    slots = last_slot - (best & ((1 << _SCORE_BITS) - 1))
    return (best >> _SCORE_BITS).int().view(torch.float32), slots

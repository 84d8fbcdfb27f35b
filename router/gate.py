"""The gate of a layer: scores every expert for every token and keeps the best, by the family's rule as data.

Takes the place of the family's own gate and returns what transformers expects of one: (logits, weights, slots).

Shapes: T tokens, D hidden size, E experts (slots), K experts per token.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from moesaic.families import GateRule
from router.phases import PhaseClock


class Assignment(NamedTuple):
    """Which slots compute each token, best first, and with which weights."""

    logits: torch.Tensor  # [T, E], activation dtype
    weights: torch.Tensor  # [T, K], float32
    slots: torch.Tensor  # [T, K], int64


class Gate(nn.Module):
    """Rows [E, D] and a rule."""

    def __init__(self, weight: torch.Tensor, rule: GateRule, clock: PhaseClock) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rule = rule
        self._clock = clock

    def forward(self, hidden: torch.Tensor) -> Assignment:
        """Scores hidden [.., D] as T rows."""
        started = time.perf_counter()
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        assignment = assign(logits, self._rule)
        self._clock.add("gate", time.perf_counter() - started)
        return assignment


def assign(logits: torch.Tensor, rule: GateRule) -> Assignment:
    """Softmax over all slots in float32, the top k of them, the lowest slot first where scores tie."""
    scores = logits.float().softmax(dim=-1)
    # torch.topk promises no order among equals; a stable sort does.
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    weights, slots = ranked[:, : rule.top_k], order[:, : rule.top_k]
    if rule.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Assignment(logits, weights, slots)

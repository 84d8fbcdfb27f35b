"""The gate of a layer: scores every expert for every token and keeps the best, by the family's rule as data.

A mask takes slots out of a layer: what is left is scored, grouped and weighted as though the others had never been
there, so that nothing of them reaches any weight. Where fewer are left than a token may have, the ranks behind them
are empty: NO_SLOT, with weight zero, and nobody is asked for them.

Shapes: T tokens, E experts (slots), K experts per token, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moesaic.families.model import GateRule, Groups
from router.top_k import top_ids

# The slot of a rank that nobody computes.
NO_SLOT = -1

# From this many scores on it is faster to find the best of a row than to sort all of it.
_SORTED_SCORES = 2048


class Assignment(NamedTuple):
    """Which slots compute each token, best first, and with which weights."""

    weights: torch.Tensor  # [T, K], float32
    slots: torch.Tensor  # [T, K], int64


def assign(
    logits: torch.Tensor,
    rule: GateRule,
    *,
    selection_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Assignment:
    """Applies the rule to logits [T, E] in float32, the lowest slot first where choices tie.

    `selection_bias` [E] takes part in the choice alone. `mask`, bool [E] or [T, E], says which slots may be chosen.
    """
    chosen = choose(logits, rule, selection_bias=selection_bias, mask=mask)
    if rule.renormalise:
        chosen = renormalise(chosen, rule, may_be_empty=mask is not None)
    if rule.least_second is not None:
        chosen = leave_second(chosen, rule.least_second)
    return chosen if rule.scale == 1 else Assignment(chosen.weights * rule.scale, chosen.slots)


def choose(
    logits: torch.Tensor,
    rule: GateRule,
    *,
    selection_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Assignment:
    """The slots, and their weights before these are renormalised, left out or scaled."""
    logits = logits.float()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if rule.weight == "sparse_mixer":
        weights, slots = _sparse_mixer(logits, rule)
    else:
        scores = _scores(logits, rule)
        choice = _choice(logits, scores, rule, selection_bias, masked=mask is not None)
        best, slots = _best(choice, rule.top_k)
        found = choice is scores and rule.weight == "score"
        weights = best if found else _weights(logits, scores, slots, rule)
        if mask is not None or rule.groups is not None:
            slots, weights = _empty(best == -torch.inf, slots, weights)
    return Assignment(weights, slots)


def renormalise(chosen: Assignment, rule: GateRule, *, may_be_empty: bool) -> Assignment:
    """Weights with a sum of one. `may_be_empty`: there may be tokens without any slot."""
    total = chosen.weights.sum(dim=-1, keepdim=True)
    if rule.epsilon:
        total += rule.epsilon
    if may_be_empty:
        total = total.masked_fill(total == 0, 1)
    return Assignment(chosen.weights / total, chosen.slots)


def leave_second(chosen: Assignment, least: float) -> Assignment:
    """Without the slots behind the first whose weight is not above `least`."""
    left_out = chosen.weights <= least
    left_out[:, 0] = False
    return without(chosen, left_out)


def without(chosen: Assignment, left_out: torch.Tensor) -> Assignment:
    """Without these of its ranks, bool [T, K]."""
    slots, weights = _empty(left_out, chosen.slots, chosen.weights)
    return Assignment(weights, slots)


def everyone(rows: torch.Tensor) -> Assignment:
    """Of a layer with one slot and no gate: all of rows [T, D] as they are, with weight one."""
    shape, device = (len(rows), 1), rows.device
    return Assignment(torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.long, device=device))


def _scores(logits: torch.Tensor, rule: GateRule) -> torch.Tensor:
    if rule.score == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if rule.score == "sigmoid" else logits


def _weights(logits: torch.Tensor, scores: torch.Tensor, slots: torch.Tensor, rule: GateRule) -> torch.Tensor:
    """Of the chosen slots [T, K], before any of the sum and the scale."""
    if rule.weight == "score":
        return scores.gather(1, slots)
    chosen = logits.gather(1, slots)
    return chosen.softmax(dim=-1) if rule.weight == "softmax" else chosen.sigmoid()


def _choice(
    logits: torch.Tensor,
    scores: torch.Tensor,
    rule: GateRule,
    selection_bias: torch.Tensor | None,
    *,
    masked: bool,
) -> torch.Tensor:
    """What the best are chosen by, [T, E]; minus infinity where a slot cannot be."""
    choice = scores if selection_bias is None else scores + selection_bias.float()
    if masked:
        choice = choice.masked_fill(logits == -torch.inf, -torch.inf)
    return choice if rule.groups is None else _within_groups(choice, rule.groups)


def _within_groups(choice: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Leaves the kept groups. A group counts with its best slots, or with those that it has; without any, not at all."""
    grouped = choice.unflatten(1, (groups.count, -1))  # [T, G, E / G]
    best = grouped.topk(groups.best, dim=-1).values
    totals = best.masked_fill(best == -torch.inf, 0).sum(dim=-1)
    totals = totals.masked_fill(best[..., 0] == -torch.inf, -torch.inf)
    kept = _best(totals, groups.keep)[1]
    dropped = torch.ones_like(totals, dtype=torch.bool).scatter_(1, kept, value=False)
    left: torch.Tensor = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    return left


def _sparse_mixer(logits: torch.Tensor, rule: GateRule) -> tuple[torch.Tensor, torch.Tensor]:
    """One slot after the other: the best that is left, weighted by the softmax over those of the rest that are near it.
    How near is measured against the logits as they were."""
    left = logits
    weights, slots = [], []
    for _ in range(rule.top_k):
        slot = left.argmax(dim=-1, keepdim=True)
        best = left.gather(1, slot)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * rule.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(1, slot))
        slots.append(slot.masked_fill(best == -torch.inf, NO_SLOT))
        left = left.scatter(1, slot, -torch.inf)
    chosen = torch.cat(slots, dim=1)
    return torch.cat(weights, dim=1).masked_fill(chosen == NO_SLOT, 0), chosen


def _empty(
    missing: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where there is nothing left to choose, no slot and no weight."""
    return slots.masked_fill(missing, NO_SLOT), weights.masked_fill(missing, 0)


def _best(choice: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row [T, E] and where they are, [T, K] both."""
    # A stable sort leaves equal scores in the order of their slots, as `top_ids` does.
    if choice.numel() <= _SORTED_SCORES:
        ranked, order = choice.sort(dim=-1, descending=True, stable=True)
        return ranked[:, :top_k], order[:, :top_k]
    slots = top_ids(choice, torch.arange(choice.shape[1], device=choice.device), top_k)
    return choice.gather(1, slots), slots

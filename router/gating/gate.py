"""The gate of a layer: it scores every slot for every token and selects the best ones, by the family's rule as data.

A mask removes slots from a layer: the remaining ones are scored, grouped and weighted as if the others did not exist,
so that no weight depends on a masked slot. Where fewer slots remain than a token may have, the ranks after them are
empty: their slot is NO_SLOT, their weight is zero, and no expert is called for them.

Shapes: T tokens, D hidden size, E slots (experts), K experts per token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from moesaic.compute.linear import Linear
from moesaic.families.model import GateRule, Groups
from router.top_k import top_ids

# The slot of an empty rank: no expert computes it.
NO_SLOT = -1

# Up to this many scores, a sort of each row is faster than a search for its largest ones.
_SORTED_SCORES = 2048


class Assignment(NamedTuple):
    """The slots that compute each token, best first, and their weights."""

    weights: torch.Tensor  # [T, K], float32
    slots: torch.Tensor  # [T, K], int64


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """The gate of one layer: the rows that score its slots, and the rule that turns the scores into an assignment.

    The rows come as data: a tensor, or a Linear where the product has to be batch-invariant. Only families whose rule
    is `own` have no such gate: they keep the module of transformers, whose rows cannot be exchanged here.
    """

    rule: GateRule
    rows: torch.Tensor | Linear  # [E, D]
    bias: torch.Tensor | None = None  # [E], added to the logits
    selection_bias: torch.Tensor | None = None  # [E], takes part in the choice alone
    # Whether the logits are computed in float32, whatever dtype the model computes in.
    exact: bool = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] -> [T, E]."""
        if isinstance(self.rows, Linear):
            return self.rows(hidden)
        if self.exact:
            return functional.linear(hidden.float(), self.rows.float(), self.bias)
        return functional.linear(hidden, self.rows, self.bias)

    def assign(self, hidden: torch.Tensor) -> Assignment:
        """Scores hidden [T, D] and applies the rule."""
        return assign(self.logits(hidden), self.rule, selection_bias=self.selection_bias)


def assign(
    logits: torch.Tensor,
    rule: GateRule,
    *,
    selection_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Assignment:
    """Applies the rule to logits [T, E] in float32; where choices tie, the lowest slot comes first.

    `selection_bias` [E] takes part in the choice alone. `mask`, bool [E] or [T, E], marks the slots that may be chosen.
    """
    chosen = choose(logits, rule, selection_bias=selection_bias, mask=mask)
    if rule.renormalise:
        chosen = renormalise(chosen, rule, may_be_empty=mask is not None)
    if rule.second_threshold is not None:
        chosen = drop_second(chosen, rule.second_threshold)
    return chosen if rule.scale == 1 else Assignment(chosen.weights * rule.scale, chosen.slots)


def choose(
    logits: torch.Tensor,
    rule: GateRule,
    *,
    selection_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Assignment:
    """The chosen slots, with their weights before these are renormalised, dropped or scaled."""
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
    """Divides the weights of each token by their sum. `may_be_empty`: some tokens may have no slot at all."""
    total = chosen.weights.sum(dim=-1, keepdim=True)
    if rule.epsilon:
        total += rule.epsilon
    if may_be_empty:
        total = total.masked_fill(total == 0, 1)
    return Assignment(chosen.weights / total, chosen.slots)


def drop_second(chosen: Assignment, threshold: float) -> Assignment:
    """Drops the slots after the first whose weight is not above the threshold."""
    dropped = chosen.weights <= threshold
    dropped[:, 0] = False
    return drop(chosen, dropped)


def drop(chosen: Assignment, dropped: torch.Tensor) -> Assignment:
    """Empties the ranks that are set in `dropped`, bool [T, K]."""
    slots, weights = _empty(dropped, chosen.slots, chosen.weights)
    return Assignment(weights, slots)


def assign_all(rows: torch.Tensor) -> Assignment:
    """The assignment of a layer without a gate: its one slot takes all of rows [T, D] with weight one."""
    shape, device = (len(rows), 1), rows.device
    return Assignment(torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.long, device=device))


def _scores(logits: torch.Tensor, rule: GateRule) -> torch.Tensor:
    if rule.score == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if rule.score == "sigmoid" else logits


def _weights(logits: torch.Tensor, scores: torch.Tensor, slots: torch.Tensor, rule: GateRule) -> torch.Tensor:
    """The weights of the chosen slots [T, K], before they are renormalised and scaled."""
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
    """The values by which slots are chosen, [T, E]; minus infinity where a slot cannot be chosen."""
    choice = scores if selection_bias is None else scores + selection_bias.float()
    if masked:
        choice = choice.masked_fill(logits == -torch.inf, -torch.inf)
    return choice if rule.groups is None else _within_groups(choice, rule.groups)


def _within_groups(choice: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Excludes all slots outside the kept groups. A group is ranked by its best slots, or by those that remain in it;
    a group without any cannot be kept."""
    grouped = choice.unflatten(1, (groups.count, -1))  # [T, G, E / G]
    best = grouped.topk(groups.best, dim=-1).values
    totals = best.masked_fill(best == -torch.inf, 0).sum(dim=-1)
    totals = totals.masked_fill(best[..., 0] == -torch.inf, -torch.inf)
    kept = _best(totals, groups.keep)[1]
    dropped = torch.ones_like(totals, dtype=torch.bool).scatter_(1, kept, value=False)
    left: torch.Tensor = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    return left


def _sparse_mixer(logits: torch.Tensor, rule: GateRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses one slot after the other: the best of the remaining ones, weighted by the softmax over the remaining slots
    that are near it. Nearness is always measured on the original logits."""
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
    """Sets NO_SLOT and weight zero where `missing` is set."""
    return slots.masked_fill(missing, NO_SLOT), weights.masked_fill(missing, 0)


def _best(choice: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row [T, E] and their slots, both [T, K]."""
    # A stable sort leaves equal scores in the order of their slots, as `top_ids` does.
    if choice.numel() <= _SORTED_SCORES:
        ranked, order = choice.sort(dim=-1, descending=True, stable=True)
        return ranked[:, :top_k], order[:, :top_k]
    slots = top_ids(choice, torch.arange(choice.shape[1], device=choice.device), top_k)
    return choice.gather(1, slots), slots

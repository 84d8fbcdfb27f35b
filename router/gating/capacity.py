"""Slots that are full: what a capacity leaves of an assignment, as the families that were trained with one have it.

It makes a token's experts depend on its neighbours, so it is in force only where a setting says so. What is dropped has
no slot and no weight: nobody is asked for it, and the token keeps what it came with.

Shapes: T tokens, E slots, K ranks, R runs of tokens that are counted together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.families.model import Capacity, GateRule
from router.gating.gate import NO_SLOT, Assignment, choose, leave_second, renormalise, without


def assign_within(
    logits: torch.Tensor, rule: GateRule, capacity: Capacity, run_lengths: Sequence[int]
) -> tuple[Assignment, int]:
    """Applies rule and capacity to logits [T, E], whose tokens are counted in consecutive runs of these lengths. Also
    how many assignments were dropped."""
    chosen = choose(logits, rule)
    best_scores = chosen.weights[:, 0]
    if rule.renormalise and capacity.share_first:
        chosen = renormalise(chosen, rule, may_be_empty=False)
    if rule.least_second is not None:
        chosen = leave_second(chosen, rule.least_second)
    dropped = beyond(chosen.slots, capacity, run_lengths, num_slots=logits.shape[1], scores=best_scores)
    chosen = without(chosen, dropped)
    if rule.renormalise and not capacity.share_first:
        chosen = renormalise(chosen, rule, may_be_empty=True)
    return Assignment(chosen.weights * rule.scale, chosen.slots), int(dropped.sum())


def beyond(
    slots: torch.Tensor,
    capacity: Capacity,
    run_lengths: Sequence[int],
    *,
    num_slots: int,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Which of slots [T, K] find them full, bool [T, K]. `scores` [T] say who is first where that counts."""
    of_runs = [(length, capacity.size(length, num_slots)) for length in run_lengths]
    lengths, sizes = torch.tensor(of_runs, dtype=torch.long).view(-1, 2).to(slots.device).unbind(1)
    run_of = torch.arange(len(run_lengths), device=slots.device).repeat_interleave(lengths)  # [T]
    order = _order(scores, run_of, capacity)
    slots, run_of = slots[order], run_of[order]
    taken = torch.zeros(len(run_lengths), num_slots, dtype=torch.long, device=slots.device)  # [R, E]
    first_of = (lengths.cumsum(0) - lengths)[run_of]
    full = torch.zeros_like(slots, dtype=torch.bool)
    for rank, wanted in enumerate(slots.unbind(1)):
        present = wanted != NO_SLOT
        asks = torch.zeros(len(wanted), num_slots, dtype=torch.long, device=slots.device)
        asks.scatter_(1, wanted.clamp(min=0)[:, None], present.long()[:, None])
        before = asks.cumsum(0) - asks
        places = before - before[first_of] + taken[run_of]
        place = places.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        full[:, rank] = present & (place >= sizes[run_of])
        counted = asks * ~full[:, rank, None] if capacity.kept_only else asks
        taken.index_add_(0, run_of, counted)
    return torch.empty_like(full).index_copy_(0, order, full)


def runs(capacity: Capacity, sequence_lengths: Sequence[int]) -> list[int]:
    """How the tokens of a step are counted together, of which consecutive ones belong to each sequence."""
    if capacity.counted == "sequence":
        return list(sequence_lengths)
    num_tokens = sum(sequence_lengths)
    group = capacity.group or num_tokens
    whole, rest = divmod(num_tokens, group) if num_tokens else (0, 0)
    return [group] * whole + ([rest] if rest else [])


def _order(scores: torch.Tensor, run_of: torch.Tensor, capacity: Capacity) -> torch.Tensor:
    """Who is counted when, run by run [T]."""
    if not capacity.by_score:
        return torch.arange(len(scores), device=scores.device)
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[run_of[by_score].argsort(stable=True)]

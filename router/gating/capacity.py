"""Expert capacity: drops the assignments beyond the capacity of their slot, as in the training of some families.

A capacity makes a token's experts depend on its neighbours, so it is in force only where a setting asks for it. A dropped
assignment has no slot and no weight: no expert computes it, and the residual of the token passes unchanged.

Shapes: T tokens, E slots, K ranks, R runs of tokens that are counted together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.families.model import Capacity, GateRule
from router.gating.gate import NO_SLOT, Assignment, choose, drop, drop_second, renormalise


def assign_with_capacity(
    logits: torch.Tensor, rule: GateRule, capacity: Capacity, run_lengths: Sequence[int]
) -> tuple[Assignment, int]:
    """Applies rule and capacity to logits [T, E], whose tokens are counted in consecutive runs of these lengths. The
    second result is the number of dropped assignments."""
    chosen = choose(logits, rule)
    best_scores = chosen.weights[:, 0]
    if rule.renormalise and capacity.renormalise_first:
        chosen = renormalise(chosen, rule, may_be_empty=False)
    if rule.second_threshold is not None:
        chosen = drop_second(chosen, rule.second_threshold)
    overflowing = _overflowing(
        chosen.slots, capacity, run_lengths, num_slots=logits.shape[1], scores=best_scores
    )
    chosen = drop(chosen, overflowing)
    if rule.renormalise and not capacity.renormalise_first:
        chosen = renormalise(chosen, rule, may_be_empty=True)
    return Assignment(chosen.weights * rule.scale, chosen.slots), int(overflowing.sum())


def run_lengths(capacity: Capacity, sequence_lengths: Sequence[int]) -> list[int]:
    """The lengths of the runs in which the tokens of a step are counted, given how many consecutive tokens belong to
    each sequence."""
    if capacity.counted == "sequence":
        return list(sequence_lengths)
    num_tokens = sum(sequence_lengths)
    size = capacity.group_size or num_tokens
    whole, rest = divmod(num_tokens, size) if num_tokens else (0, 0)
    return [size] * whole + ([rest] if rest else [])


def _overflowing(
    slots: torch.Tensor,
    capacity: Capacity,
    run_lengths: Sequence[int],
    *,
    num_slots: int,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Which assignments of slots [T, K] find their slot full, bool [T, K]. `scores` [T] rank the tokens where the
    capacity is batch-prioritised."""
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
        requests = torch.zeros(len(wanted), num_slots, dtype=torch.long, device=slots.device)
        requests.scatter_(1, wanted.clamp(min=0)[:, None], present.long()[:, None])
        before = requests.cumsum(0) - requests
        positions = before - before[first_of] + taken[run_of]
        position = positions.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        full[:, rank] = present & (position >= sizes[run_of])
        counted = requests * ~full[:, rank, None] if capacity.count_kept_only else requests
        taken.index_add_(0, run_of, counted)
    return torch.empty_like(full).index_copy_(0, order, full)


def _order(scores: torch.Tensor, run_of: torch.Tensor, capacity: Capacity) -> torch.Tensor:
    """The order in which tokens are counted, run by run, [T]."""
    if not capacity.batch_prioritised:
        return torch.arange(len(scores), device=scores.device)
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[run_of[by_score].argsort(stable=True)]

"""The gate of a layer: it scores every slot for every token and selects the best ones, by the family's rule as data.

The rows of a micro-batch may belong to several views of the model, which leave out slots of the folder or have more
than those. All rows are scored by the folder's gate in one product, so that these scores have the same bits in every view;
slots that it does not have are scored by products of their own. Then each view's columns are selected, not masked: leaving
a slot out gives the very numbers of a model without it. Rows that have to do without a slot that nobody computes at the moment
(absence.py) are chosen first as if it were there, so that only tokens that want it change.

A mask removes slots from a layer, too, where they form groups: the remaining ones are scored, grouped and weighted as if
the others did not exist. Where fewer slots remain than a token may have, the ranks after them are empty: their slot is
NO_SLOT, their weight is zero, and no expert is called for them.

Shapes: T tokens, D hidden size, E slots (experts), K experts per token, G groups, S slots of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from moesaic.compute.linear import Linear
from moesaic.epoch import GateRow
from moesaic.families.model import GateRule, Groups
from router.gating.absence import Absence
from router.gating.model_view import GateView, ViewRows
from router.top_k import top_ids

# The slot of an empty rank: no expert computes it.
NO_SLOT = -1

# Up to this many scores, a sort of each row is faster than a search for its largest ones.
_SORTED_SCORES = 2048

# The most by which the logit of an added slot counts above those of the folder's, so that no sum of scores overflows.
_MOST_ABOVE = 80.0


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
    # What views make of this gate, for as long as these exist.
    _prepared: WeakKeyDictionary[GateView, _PreparedView] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @property
    def hidden_size(self) -> int:
        return self.rows.in_features if isinstance(self.rows, Linear) else self.rows.shape[1]

    @property
    def num_slots(self) -> int:
        return self.rows.out_features if isinstance(self.rows, Linear) else len(self.rows)

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

    def assign_views(self, layer: int, hidden: torch.Tensor, views: Sequence[ViewRows]) -> Assignment:
        """Scores hidden [T, D] and applies the rule to the rows of each view, as that sees the gate of the layer. The views
        cover all rows, and a single one need not say so; without any, the gate is the folder's."""
        runs = _gate_runs(layer, views)
        if all(run.view is None and run.absence is None for run in runs):
            return self.assign(hidden)
        logits = self.logits(hidden)
        if len(runs) == 1:
            return self._assign_run(layer, runs[0], hidden, logits)
        return _joined(
            [
                self._assign_run(layer, run, hidden[run.start : run.end], logits[run.start : run.end])
                for run in runs
            ]
        )

    def _assign_run(
        self, layer: int, run: _GateRun, hidden: torch.Tensor, logits: torch.Tensor
    ) -> Assignment:
        chosen = self.assign_view(run.view, hidden, logits)
        if run.absence is None:
            return chosen
        absent = run.absence.slots[layer]
        missing = torch.isin(chosen.slots, torch.tensor(sorted(absent), device=chosen.slots.device))
        num_missing = int(missing.sum())
        if not num_missing:
            return chosen
        run.absence.tally[layer] = run.absence.tally.get(layer, 0) + num_missing
        if run.absence.stand_in == "renormalise":
            return _leave_out(chosen, missing, self.rule)
        view = self._without(run.view, absent)
        return chosen if view is None else _replaced(chosen, missing, self.assign_view(view, hidden, logits))

    def _without(self, view: GateView | None, absent: frozenset[int]) -> GateView | None:
        """A view without some of its slots; None where none is left."""
        seen = GateView(tuple(range(self.num_slots)), self.rule.top_k, {}) if view is None else view
        slots = tuple(slot for slot in seen.slots if slot not in absent)
        rows = {slot: row for slot, row in seen.rows.items() if slot not in absent}
        return GateView(slots, min(seen.top_k, len(slots)), rows) if slots else None

    def view_logits(self, view: GateView, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits [T, S] of the slots of a view, from those of all slots of the folder [T, E]."""
        prepared = self._prepare(view)
        if prepared.added is not None:
            logits = torch.cat((logits, prepared.added.logits(hidden)), dim=1)
        return logits if prepared.columns is None else logits.index_select(1, prepared.columns)

    def assign_view(self, view: GateView | None, hidden: torch.Tensor, logits: torch.Tensor) -> Assignment:
        """Applies the rule to hidden [T, D] with the logits [T, E] of the folder's slots, as a view sees the gate; None: as
        the folder has it."""
        if view is None:
            return assign(logits, self.rule, selection_bias=self.selection_bias)
        prepared = self._prepare(view)
        chosen = assign(
            self.view_logits(view, hidden, logits),
            prepared.rule,
            selection_bias=prepared.selection_bias,
            num_added=prepared.num_added,
        )
        return Assignment(chosen.weights, prepared.slots[chosen.slots])

    def _prepare(self, view: GateView) -> _PreparedView:
        prepared = self._prepared.get(view)
        if prepared is None:
            prepared = self._prepared[view] = _prepare(self, view)
        return prepared

    def beside(self, rows: Sequence[GateRow]) -> Gate:
        """A gate that scores other slots, in the way in which this one scores its own."""
        values = torch.stack([torch.frombuffer(bytearray(row.values), dtype=torch.float32) for row in rows])
        weight = values.to(self.rows.device, self.rows.dtype)
        return replace(
            self,
            rows=Linear(weight, batch_invariant=True) if isinstance(self.rows, Linear) else weight,
            bias=_like(self.bias, [row.bias for row in rows]),
            selection_bias=_like(self.selection_bias, [row.selection_bias for row in rows]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _PreparedView:
    """What the view of a gate comes to in tensors."""

    # With the number of slots that the view allows a token.
    rule: GateRule
    # Scores the slots that the folder's gate does not score, or not in this way.
    added: Gate | None
    # Which of the folder's logits, followed by those of `added`, the view has; None: all of them.
    columns: torch.Tensor | None  # [S]
    # The slot of each column, and NO_SLOT at the end, where that index finds it.
    slots: torch.Tensor  # [S + 1]
    selection_bias: torch.Tensor | None  # [S]
    # How many of the columns, the last ones, are slots that the folder does not have.
    num_added: int


def _prepare(gate: Gate, view: GateView) -> _PreparedView:
    num_slots, device = gate.num_slots, gate.rows.device
    added = gate.beside(list(view.rows.values())) if view.rows else None
    column_of = {slot: num_slots + index for index, slot in enumerate(view.rows)}
    columns = [column_of.get(slot, slot) for slot in view.slots]
    index = torch.tensor(columns, device=device)
    biases = [gate.selection_bias, None if added is None else added.selection_bias]
    known = [bias for bias in biases if bias is not None]
    return _PreparedView(
        rule=replace(gate.rule, top_k=view.top_k),
        added=added,
        columns=None if columns == list(range(num_slots + len(view.rows))) else index,
        slots=torch.tensor([*view.slots, NO_SLOT], device=device),
        selection_bias=torch.cat(known).index_select(0, index) if known else None,
        num_added=sum(slot >= num_slots for slot in view.slots),
    )


def _like(bias: torch.Tensor | None, values: list[float]) -> torch.Tensor | None:
    """The values as a bias like that of the folder's gate; None where that has none."""
    return None if bias is None else torch.tensor(values, device=bias.device, dtype=bias.dtype)


class _GateRun(NamedTuple):
    """Consecutive rows that see the gate of a layer alike; None: as the folder has it."""

    view: GateView | None
    start: int
    end: int
    # Of rows that lack a slot of this layer.
    absence: Absence | None


def _gate_runs(layer: int, views: Sequence[ViewRows]) -> list[_GateRun]:
    runs: list[_GateRun] = []
    for of_view in views:
        view, absence = of_view.view.gates.get(layer), of_view.absence
        if absence is not None and layer not in absence.slots:
            absence = None
        if runs and runs[-1].view is view and runs[-1].absence is absence:
            runs[-1] = runs[-1]._replace(end=of_view.end)
        else:
            runs.append(_GateRun(view, of_view.start, of_view.end, absence))
    return runs


def _leave_out(chosen: Assignment, missing: torch.Tensor, rule: GateRule) -> Assignment:
    """Empties the ranks that are set in `missing`, bool [T, K], and divides what they had among the others where the rule
    makes the weights of a token depend on one another. A token that would have no slot left keeps all."""
    left = ~missing & (chosen.slots != NO_SLOT)
    kept = drop(chosen, missing & left.any(dim=1, keepdim=True))
    if not rule.renormalise and rule.weight != "softmax":
        return kept
    total, of_kept = (one.weights.sum(dim=1, keepdim=True) for one in (chosen, kept))
    factor = torch.where(missing.any(dim=1, keepdim=True) & (of_kept != 0), total / of_kept, 1)
    return Assignment(kept.weights * factor, kept.slots)


def _replaced(chosen: Assignment, missing: torch.Tensor, other: Assignment) -> Assignment:
    """The other assignment for the tokens that have anything set in `missing`, bool [T, K]."""
    most = max(chosen.slots.shape[1], other.slots.shape[1])
    chosen, other, touched = _padded(chosen, most), _padded(other, most), missing.any(dim=1, keepdim=True)
    return Assignment(
        torch.where(touched, other.weights, chosen.weights), torch.where(touched, other.slots, chosen.slots)
    )


def _joined(parts: Sequence[Assignment]) -> Assignment:
    """The assignments of consecutive rows; where a token has fewer slots than others, its last ranks are empty."""
    most = max(part.slots.shape[1] for part in parts)
    padded = [_padded(part, most) for part in parts]
    return Assignment(
        torch.cat([part.weights for part in padded]), torch.cat([part.slots for part in padded])
    )


def _padded(chosen: Assignment, num_ranks: int) -> Assignment:
    if chosen.slots.shape[1] == num_ranks:
        return chosen
    more = (0, num_ranks - chosen.slots.shape[1])
    return Assignment(functional.pad(chosen.weights, more), functional.pad(chosen.slots, more, value=NO_SLOT))


def assign(
    logits: torch.Tensor,
    rule: GateRule,
    *,
    selection_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    num_added: int = 0,
) -> Assignment:
    """Applies the rule to logits [T, E] in float32; where choices tie, the lowest slot comes first.

    `selection_bias` [E] takes part in the choice alone. `mask`, bool [E] or [T, E], marks the slots that may be chosen.
    `num_added`: how many of the slots, the last ones, the model folder does not have. Where the rule renormalises, a token
    that chooses none of them gets the same bits as without them.
    """
    chosen = choose(logits, rule, selection_bias=selection_bias, mask=mask, num_added=num_added)
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
    num_added: int = 0,
) -> Assignment:
    """The chosen slots, with their weights before these are renormalised, dropped or scaled."""
    logits = logits.float()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if rule.weight == "sparse_mixer":
        weights, slots = _sparse_mixer(logits, rule)
    else:
        scores = _scores(logits, rule) if not num_added else _grown_scores(logits, rule, num_added)
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


def _grown_scores(logits: torch.Tensor, rule: GateRule, num_added: int) -> torch.Tensor:
    """The scores of a layer with added slots. Under a softmax whose weights are renormalised, a common factor of all
    scores does not matter: they are relative to the folder's slots, and so those of the folder's keep their bits."""
    if rule.score != "softmax" or not rule.renormalise or rule.epsilon or rule.selection_bias:
        return _scores(logits, rule)
    own, added = logits.split([logits.shape[1] - num_added, num_added], dim=1)
    if not own.shape[1]:
        return _scores(logits, rule)
    above = (added - own.logsumexp(dim=-1, keepdim=True)).clamp(max=_MOST_ABOVE)
    return torch.cat((own.softmax(dim=-1), above.exp()), dim=1)


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

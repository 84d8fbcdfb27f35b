"""What operators ask of hidden states: their mean over texts, and how often new gate rows would be chosen.

Both see the rows of a sequence once, also when it is preempted and starts over. The engine's thread adds to them; others
may read them when the sequences have ended.

Shapes: n rows of one sequence, D hidden size, S slots of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moesaic.epoch import GateRow
from router.gating.gate import Gate
from router.gating.model_view import GateView, ModelView

HiddenState = Literal["residual", "gate_input"]
# Takes the rows [n, D] of a layer that begin at a position of their sequence.
_Take = Callable[[int, int, Tensor], None]

# Unit vectors that are multiplied with a gate at a time, to read its rows back.
_UNITS_AT_ONCE = 256


@dataclass(slots=True)
class _Seen:
    """How many leading tokens of a sequence each layer has been seen with."""

    by_layer: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def new(self, layer: int, position: int, rows: Tensor) -> Tensor:
        """Those of the rows, which begin at a position, that were not seen before."""
        seen = self.by_layer[layer]
        self.by_layer[layer] = max(seen, position + len(rows))
        return rows[max(0, seen - position) :]


class HiddenMeans:
    """The mean of a hidden state over texts, for each layer with a gate."""

    def __init__(self, state: HiddenState, *, all_tokens: bool) -> None:
        """`all_tokens`: whether the mean is over all tokens, or over the last one of each text."""
        self._state = state
        self._all_tokens = all_tokens
        self._sums: dict[int, Tensor] = {}
        self._counts: defaultdict[int, int] = defaultdict(int)

    def of_text(self, num_tokens: int) -> TextCapture:
        """Takes the hidden states of a text."""
        last = num_tokens - 1

        def add(layer: int, position: int, rows: Tensor) -> None:
            if not self._all_tokens:
                rows = rows[max(0, last - position) :]
            if len(rows):
                self._counts[layer] += len(rows)
                total = rows.double().sum(dim=0).cpu()
                self._sums[layer] = self._sums[layer] + total if layer in self._sums else total

        return TextCapture(self._state, add)

    def means(self) -> dict[int, Tensor]:
        """By layer, [D] float32."""
        return {layer: (total / self._counts[layer]).float() for layer, total in sorted(self._sums.items())}


class TextCapture:
    """A `Capture` of one sequence that hands every new row on once."""

    def __init__(self, state: HiddenState, take: _Take) -> None:
        self._state = state
        self._take = take
        self._seen = _Seen()

    def residual(self, layer: int, position: int, rows: Tensor) -> None:
        self._hand_on("residual", layer, position, rows)

    def gate_input(self, layer: int, position: int, rows: Tensor) -> None:
        self._hand_on("gate_input", layer, position, rows)

    def _hand_on(self, state: HiddenState, layer: int, position: int, rows: Tensor) -> None:
        if state == self._state:
            new = self._seen.new(layer, position, rows)
            self._take(layer, position + len(rows) - len(new), new)


@dataclass(frozen=True, slots=True)
class LayerShare:
    """How many of the tokens that a layer's gate saw would have chosen a new row."""

    layer: int
    tokens: int
    taken: int
    # Of the layer's rows with the new ones, each with length one.
    condition_number: float


class GateShares:
    """How often new gate rows would be chosen beside those of a view, without calling new experts."""

    def __init__(
        self, view: ModelView, gates: Mapping[int, Gate], rows: Mapping[int, Sequence[GateRow]]
    ) -> None:
        """`rows`: the new ones of each layer."""
        self._gates = gates
        self._grown = {layer: _grown(view, gates[layer], layer, new) for layer, new in rows.items()}
        self._tokens: defaultdict[int, int] = defaultdict(int)
        self._taken: defaultdict[int, int] = defaultdict(int)

    def of_text(self) -> TextCapture:
        """Counts the tokens of a text."""
        return TextCapture("gate_input", self._count)

    def shares(self) -> Iterator[LayerShare]:
        """Layer by layer."""
        for layer, (grown, _) in sorted(self._grown.items()):
            condition = condition_number(gate_rows(self._gates[layer], grown))
            yield LayerShare(layer, self._tokens[layer], self._taken[layer], condition)

    def _count(self, layer: int, position: int, rows: Tensor) -> None:
        if layer not in self._grown or not len(rows):
            return
        view, first_new = self._grown[layer]
        gate = self._gates[layer]
        slots = gate.assign_view(view, rows, gate.logits(rows)).slots
        self._tokens[layer] += len(rows)
        self._taken[layer] += int((slots >= first_new).any(dim=1).sum())


def _grown(view: ModelView, gate: Gate, layer: int, new: Sequence[GateRow]) -> tuple[GateView, int]:
    """How a layer's gate would be with the new rows, and the first of their slots."""
    own = view.gates.get(layer)
    slots = tuple(range(gate.num_slots)) if own is None else own.slots
    first = max((*view.versions[layer], gate.num_slots - 1)) + 1
    added = dict(enumerate(new, first))
    rows = added if own is None else {**own.rows, **added}
    return GateView((*slots, *added), gate.rule.top_k, rows), first


def gate_rows(gate: Gate, view: GateView) -> Tensor:
    """What scores the slots of a view, [S, D] float32. A gate may hold its rows in the layout of its product, so they are
    read by multiplying unit vectors."""
    size = gate.hidden_size
    device = gate.rows.device

    def logits(hidden: Tensor) -> Tensor:
        hidden = hidden.to(gate.rows.dtype)
        return gate.view_logits(view, hidden, gate.logits(hidden)).float()

    bias = logits(torch.zeros(1, size, device=device))
    units = torch.eye(size, device=device).split(_UNITS_AT_ONCE)
    return torch.cat([logits(part) - bias for part in units]).T


def condition_number(rows: Tensor) -> float:
    """That of rows [S, D] whose length is made one."""
    return float(torch.linalg.cond(torch.nn.functional.normalize(rows.double(), dim=1)))

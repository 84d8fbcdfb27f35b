"""One layer of a micro-batch in flight: what is asked, the waves of calls, and what is still missing."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from router.dispatch.combine import Combiner
from router.dispatch.layer_request import LayerRequest
from router.dispatch.row_grouping import RowsBySlot, WorkerRows
from router.dispatch.wave import Wave, WorkerCall
from router.workers.transports.base import WorkerAnswer


@dataclass(slots=True, eq=False)
class LayerCall:
    """Every group of the layer is missing until a worker has answered for it."""

    request: LayerRequest
    groups: RowsBySlot
    # The version that computes each group.
    versions: Sequence[bytes]
    combiner: Combiner
    # The dtype that the model computes in.
    dtype: torch.dtype
    # [T, K] on the host.
    slots: Tensor
    # Which tokens of the micro-batch the rows are; None: all of them.
    tokens: Sequence[int] | None
    waves: list[Wave] = field(default_factory=list)
    # The calls whose answers are in the combiner.
    answered: list[WorkerCall] = field(default_factory=list)
    # The groups without an answer, and for each of them the incarnations of the workers that failed to
    # compute it.
    missing: dict[int, frozenset[str]] = field(init=False)
    # Why the last attempt at each of these groups failed.
    errors: dict[int, MoesaicError] = field(default_factory=dict)
    # The last call of which a group's rows were not finite.
    not_finite: dict[int, WorkerCall] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missing = dict.fromkeys(range(len(self.groups.slots)), frozenset())

    @property
    def in_flight(self) -> list[WorkerCall]:
        """The calls whose answers have not been waited for."""
        return [call for wave in self.waves for call in (*wave.calls, *wave.hedges) if not call.received]

    def begin_wave(self, *, silent: Set[str], deadline_s: float) -> Wave:
        """A wave for every group that is missing. It leaves out the workers that failed the group before, and
        those that are silent."""
        excluded = {group: failed | silent for group, failed in sorted(self.missing.items())}
        wave = Wave(excluded, deadline_s, [], [])
        self.waves.append(wave)
        return wave

    def narrow(self, call: WorkerCall, failed: Sequence[int]) -> WorkerCall | None:
        """An answered call without these groups, which fail; None if nothing is left of it."""
        left = [index for index, group in enumerate(call.rows.groups) if group not in failed]
        if not left:
            return None
        rows = self.groups.worker_rows([call.rows.groups[index] for index in left])
        return replace(call, rows=rows, versions=[call.versions[index] for index in left])

    def accept(self, call: WorkerCall, answer: WorkerAnswer) -> None:
        """Takes an answer. Raises DataLoss unless it is valid."""
        self.request.check(answer, call.rows, call.versions)
        self.combiner.add(call.rows, answer)
        self.answered.append(call)
        for group in call.rows.groups:
            self.missing.pop(group, None)
            self.errors.pop(group, None)

    def fail(self, call: WorkerCall, error: MoesaicError, rows: WorkerRows | None = None) -> None:
        """Leaves the rows of a call, or those of them that are given, out of the result, unless another replica computes
        them."""
        rows = call.rows if rows is None else rows
        incarnation = call.link.replica.incarnation
        for group in rows.groups:
            self.missing[group] = self.missing.get(group, frozenset()) | {incarnation}
        self._leave_out(rows, error)

    def refuted(self) -> list[tuple[int, WorkerCall]]:
        """The groups whose rows were not finite from one worker and are from another one, with the call to the first; one
        group of each call. Each is told once. Where nobody's rows are finite the version is to blame, and no worker."""
        refuted = [(group, call) for group, call in self.not_finite.items() if group not in self.missing]
        for group, _ in refuted:
            del self.not_finite[group]
        return list({id(call): (group, call) for group, call in refuted}.values())

    def fail_unheld(self, group: int, error: MoesaicError) -> None:
        """Leaves out a group that no replica can be asked for. An earlier error of a replica is kept."""
        if group not in self.errors:
            self._leave_out(self.groups.worker_rows([group]), error)

    def failed_tokens(self) -> dict[int, MoesaicError]:
        """By token of the micro-batch: why one of its experts is missing."""
        failed = {row: error for group, error in self.errors.items() for row in self.groups.tokens_of(group)}
        return failed if self.tokens is None else {self.tokens[row]: error for row, error in failed.items()}

    def _leave_out(self, rows: WorkerRows, error: MoesaicError) -> None:
        self.errors.update(dict.fromkeys(rows.groups, error))
        self.combiner.clear(rows)

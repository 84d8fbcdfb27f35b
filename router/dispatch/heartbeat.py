"""The router's heartbeat: replicas that are idle, or that something speaks against, compute one row now and then.

A probe is a call like any other, so that the worker's compute thread has to answer it, and the answer is checked like any
other. It travels beside the calls of the engine's thread, over a stream of its own; nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

import torch

from moesaic.errors import DataLoss, FailedPrecondition, InvalidArgument, MoesaicError, Overloaded
from moesaic.v1 import common_pb2
from moesaic.wire.tensors import WIRE_DTYPES, decode_rows, narrow
from router.dispatch.layer_request import LayerRequest
from router.dispatch.row_grouping import RowsBySlot
from router.workers.circuit import PROBE_TIMEOUT_S
from router.workers.replica_pool import DueProbe, ReplicaPool
from router.workers.transports.base import WorkerAnswer

log = logging.getLogger(__name__)

# How often it looks whether a probe is due.
PERIOD_S = 0.05
STOP_TIMEOUT_S = 5.0
# Who answers so lives. That a version has gone is no failure: tables come late.
_SIGNS_OF_LIFE = (Overloaded, FailedPrecondition, InvalidArgument)


class Heartbeat:
    """A thread that sends the probes that a pool says are due."""

    def __init__(
        self,
        pool: ReplicaPool,
        hidden_size: int,
        dtype: torch.dtype,
        wire_dtype: common_pb2.Dtype | None = None,
    ) -> None:
        """Rows of the model are `hidden_size` values of `dtype`, and travel as `wire_dtype` if it is given."""
        self._pool = pool
        self._hidden, self._scales = narrow(
            torch.ones(1, hidden_size, dtype=dtype), wire_dtype or WIRE_DTYPES[dtype]
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when no probe will be sent any more. Those on their way end by themselves."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def beat(self) -> None:
        """Sends the probes that are due."""
        for probe in self._pool.due_probes():
            self._send(probe)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            try:
                self.beat()
            except Exception:
                log.exception("a heartbeat failed")

    def _send(self, probe: DueProbe) -> None:
        address, digest = probe.version
        layer = LayerRequest("", address.layer, self._hidden, self._scales, None)
        rows = RowsBySlot.of(torch.tensor([[address.slot]])).worker_rows([0])
        request, hidden = layer.to_worker(rows, [digest], 1 + int(1000 * PROBE_TIMEOUT_S))

        def check(answer: WorkerAnswer) -> None:
            layer.check(answer, rows, [digest])
            # Where no other replica proves the contrary, the version itself may be to blame.
            if probe.is_blamed and not decode_rows(answer.response.output, answer.output).isfinite().all():
                raise DataLoss("the worker's answer is not finite")

        probe.link.probe(request, hidden, PROBE_TIMEOUT_S, partial(self._note, probe, check))

    def _note(
        self,
        probe: DueProbe,
        check: Callable[[WorkerAnswer], None],
        outcome: WorkerAnswer | MoesaicError | TimeoutError,
    ) -> None:
        self._pool.note_probe(probe, _failure(check, outcome))


def _failure(
    check: Callable[[WorkerAnswer], None], outcome: WorkerAnswer | MoesaicError | TimeoutError
) -> Exception | None:
    """What is wrong with an outcome; None for a sound worker."""
    if isinstance(outcome, _SIGNS_OF_LIFE):
        return None
    if not isinstance(outcome, WorkerAnswer):
        return outcome
    try:
        check(outcome)
    except DataLoss as error:
        return error
    return None

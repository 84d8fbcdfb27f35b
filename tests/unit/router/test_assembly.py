"""What a router is made of, by its settings."""

from __future__ import annotations

import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from support.encoder_decoders import write_switch
from support.expert_calls import ReferenceExperts
from support.local_router import ReferenceStep, router_config

from moesaic.epoch import Epoch
from router.assembly import load_router
from router.dispatch.dispatcher import Dispatcher
from router.engine.request import Failed, Finished, SequenceEvent, SequenceRequest
from router.engine.sampling_params import SamplingParams
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool

WAIT_S = 60.0


class ReferenceDispatcher:
    """A Dispatcher that computes every expert here."""

    def __init__(self, folder: Path) -> None:
        self._experts = ReferenceExperts(folder)

    def begin(self, epoch: Epoch, **_: Any) -> ReferenceStep:
        return ReferenceStep(self._experts)


def test_overlap_never_cuts_what_an_encoder_has_to_read_as_a_whole(tmp_path: Path) -> None:
    write_switch(tmp_path, 1)
    loaded = load_router(router_config(tmp_path, "auto", overlap="on"), ReplicaPool(), PhaseClock())
    dispatcher = cast(Dispatcher, ReferenceDispatcher(tmp_path))
    engine = replace(loaded, dispatcher=dispatcher).engine(Epoch.of("tiny", {}))
    events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    deadline_s = time.monotonic() + WAIT_S
    engine.submit(SequenceRequest("a", (5, 6, 7, 8), params, deadline_s, events.put))
    engine.start()
    while not isinstance(event := events.get(timeout=WAIT_S), Finished):
        assert not isinstance(event, Failed), event.error
    engine.stop(WAIT_S)
    assert engine.stats().steps > 0 and engine.stats().overlapped_steps == 0

"""What a router is made of, by its settings."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.checkpoints import write_mixtral
from support.encoder_decoders import write_switch
from support.engine_events import collect
from support.expert_calls import ReferenceExperts
from support.local_router import ReferenceStep, router_config
from support.views import plain_view

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.epoch import Epoch
from moesaic.errors import CheckpointError
from router.assembly import load_router
from router.dispatch.dispatcher import Dispatcher, DispatchRules, DispatchStep
from router.engine.request import Finished, SequenceEvent, SequenceRequest
from router.engine.sampling_params import SamplingParams
from router.gating.model_view import ViewRows
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool

WAIT_S = 60.0


class ReferenceDispatcher(Dispatcher):
    """A Dispatcher that computes every expert here."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ReplicaPool(), PhaseClock(), DispatchRules(call_timeout_s=1.0))
        self._experts = ReferenceExperts(folder)

    def begin(self, views: Sequence[ViewRows], **_: Any) -> DispatchStep:
        return cast(DispatchStep, ReferenceStep(self._experts))


def test_overlap_never_cuts_what_an_encoder_has_to_read_as_a_whole(tmp_path: Path) -> None:
    write_switch(tmp_path, 1)
    loaded = load_router(router_config(tmp_path, "auto", overlap="on"), ReplicaPool(), PhaseClock())
    dispatcher = ReferenceDispatcher(tmp_path)
    engine = replace(loaded, dispatcher=dispatcher).engine()
    events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    deadline_s = time.monotonic() + WAIT_S
    engine.submit(
        SequenceRequest("a", (5, 6, 7, 8), params, deadline_s, events.put, plain_view(Epoch.of("tiny", {})))
    )
    engine.start()
    assert isinstance(collect(events)[1], Finished)
    engine.stop(WAIT_S)
    assert engine.stats().steps > 0 and engine.stats().overlapped_steps == 0


def test_a_router_reads_no_folder_but_the_one_that_was_checked_elsewhere(tmp_path: Path) -> None:
    here, elsewhere = write_mixtral(tmp_path / "here"), write_mixtral(tmp_path / "elsewhere")
    (elsewhere / "chat_template.jinja").write_text("{{ messages }}")
    identity = FolderIdentity.of(open_checkpoint(elsewhere))
    with pytest.raises(CheckpointError) as refused:
        load_router(replace(router_config(here, "auto"), identity=identity), ReplicaPool(), PhaseClock())
    assert refused.value.reason == "OTHER_MODEL"

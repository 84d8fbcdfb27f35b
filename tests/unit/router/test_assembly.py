"""What a router is made of, by its settings: how long a sequence may be, and whether a step may be cut."""

from __future__ import annotations

import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.checkpoints import write_mixtral
from support.encoder_decoders import write_switch
from support.expert_calls import ReferenceExperts
from support.local_router import ReferenceStep

from moesaic.epoch import Epoch
from moesaic.errors import InvalidArgument
from moesaic.settings import EngineSettings
from router.assembly import LoadedRouter, load_router
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.engine.request import Failed, Finished, SequenceEvent, SequenceRequest
from router.engine.sampling_params import SamplingParams
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool

WAIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 1 MiB of cache holds 2,048 tokens of it: 2 layers x 2 (keys, values) x 2 heads x 16 numbers of 4 bytes.
    return write_mixtral(
        tmp_path_factory.mktemp("model"), hidden_size=64, max_position_embeddings=4096, seed=1
    )


def load(model: Path, **engine: Any) -> LoadedRouter:
    config = RouterConfig(model, "tiny", "127.0.0.1", 0, "cpu", "float32", EngineSettings(**engine))
    return load_router(config, ReplicaPool(), PhaseClock())


def test_without_a_setting_the_cache_holds_the_whole_context(model: Path) -> None:
    assert load(model).max_model_len == 4096


def test_a_shorter_context_may_be_asked_for(model: Path) -> None:
    assert load(model, max_model_len=100).max_model_len == 100


def test_a_longer_one_than_the_model_has_is_refused(model: Path) -> None:
    with pytest.raises(InvalidArgument, match="4096") as refused:
        load(model, max_model_len=4097)
    assert refused.value.field == "max_model_len"


def test_a_small_cache_shortens_the_context_unless_a_length_was_asked_for(model: Path) -> None:
    assert load(model, kv_cache_mib=1).max_model_len == 2048
    with pytest.raises(InvalidArgument, match="KV cache holds 2048"):
        load(model, kv_cache_mib=1, max_model_len=3000)


class ReferenceDispatcher:
    """A Dispatcher that computes every expert here."""

    def __init__(self, folder: Path) -> None:
        self._experts = ReferenceExperts(folder)

    def begin(self, epoch: Epoch, **_: Any) -> ReferenceStep:
        return ReferenceStep(self._experts)


def test_overlap_never_cuts_what_an_encoder_has_to_read_as_a_whole(tmp_path: Path) -> None:
    write_switch(tmp_path, 1)
    loaded = replace(
        load(tmp_path, overlap="on", threads=1), dispatcher=cast(Dispatcher, ReferenceDispatcher(tmp_path))
    )
    engine = loaded.engine(Epoch.of("tiny", {}))
    events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    deadline_s = time.monotonic() + WAIT_S
    engine.submit(SequenceRequest("a", (5, 6, 7, 8), params, deadline_s, events.put))
    engine.start()
    while not isinstance(event := events.get(timeout=WAIT_S), Finished):
        assert not isinstance(event, Failed), event.error
    engine.stop(WAIT_S)
    assert engine.stats().steps > 0 and engine.stats().overlapped_steps == 0

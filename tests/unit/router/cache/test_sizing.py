"""How long a sequence may be: what the model, the cache and the setting allow together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_mixtral

from moesaic.errors import InvalidArgument
from moesaic.settings import EngineSettings
from router.assembly import LoadedRouter, load_router
from router.cache import sizing
from router.config import RouterConfig
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool


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


def test_without_a_setting_the_cache_heeds_the_memory_limit_of_a_container(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 2 MiB that are free a quarter may become the cache: half of what holds 2,048 tokens.
    monkeypatch.setattr(sizing, "read_memory", lambda: (1 << 30, 2 << 20))
    assert load(model).max_model_len == 1024

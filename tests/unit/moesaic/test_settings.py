"""Settings: one vocabulary from every source, and errors that name the key and what it accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.errors import InvalidArgument
from moesaic.settings import Settings, find_written, load_settings

LONG = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
SHORT = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


@pytest.mark.parametrize("written", [*LONG, "auto"])
def test_a_number_type_has_one_canonical_name_whichever_is_given(written: str) -> None:
    settings = load_settings(dtype=written, engine={"wire_dtype": written}, worker={"expert_dtype": written})
    assert settings.dtype == settings.engine.wire_dtype == LONG.get(written, "auto")
    assert settings.worker.expert_dtype == SHORT.get(written, "auto")


def test_number_types_are_the_same_in_the_environment_and_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("dtype: bf16\nworker:\n  expert_dtype: float32\n")
    monkeypatch.setenv("MOESAIC_ENGINE__WIRE_DTYPE", "fp32")
    settings = load_settings(config)
    assert (settings.dtype, settings.engine.wire_dtype, settings.worker.expert_dtype) == (
        "bfloat16",
        "float32",
        "fp32",
    )


def test_number_types_beyond_those_stay_what_they_are() -> None:
    settings = load_settings(engine={"wire_dtype": "int8"}, worker={"expert_dtype": "int4"})
    assert (settings.engine.wire_dtype, settings.worker.expert_dtype) == ("int8", "int4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dtype": "int8"}, "dtype: must be one of auto, float32, bfloat16, fp32, bf16"),
        (
            {"engine": {"wire_dtype": "float8"}},
            "engine.wire_dtype: must be one of auto, float32, bfloat16, int8, fp32, bf16",
        ),
        (
            {"worker": {"expert_dtype": "fp16"}},
            "worker.expert_dtype: must be one of auto, fp32, bf16, int8, int4, float32, bfloat16",
        ),
        ({"dtype": ["fp32"]}, "dtype: must be one of auto, float32, bfloat16, fp32, bf16"),
    ],
)
def test_a_wrong_number_type_is_told_what_is_accepted(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_settings(**flags)
    assert caught.value.message == message
    assert caught.value.field == message.partition(":")[0]


def test_on_and_off_may_be_written_plainly_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("engine:\n  overlap: on\n  shared_memory: off\n  capacity: off\n")
    engine = load_settings(config).engine
    assert (engine.overlap, engine.shared_memory, engine.capacity) == ("on", "off", "off")
    config.write_text("engine:\n  shared_memory: on\n")
    with pytest.raises(InvalidArgument, match=r"engine\.shared_memory: must be one of auto, off"):
        load_settings(config)


def test_flags_win_over_the_environment_over_yaml_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("http_port: 1\ngrpc_port: 1\nhost: from-yaml\n")
    monkeypatch.setenv("MOESAIC_HTTP_PORT", "2")
    monkeypatch.setenv("MOESAIC_GRPC_PORT", "2")
    settings = load_settings(config, http_port=3, device=None)
    assert (settings.http_port, settings.grpc_port, settings.host) == (3, 2, "from-yaml")
    assert settings.device == Settings().device


@pytest.mark.parametrize("written, read", [("on", "on"), ("off", "off"), ('"on"', "on"), ('"off"', "off")])
def test_on_and_off_may_stand_in_yaml_with_and_without_quotes(
    tmp_path: Path, written: str, read: str
) -> None:
    config = tmp_path / "moesaic.yml"
    config.write_text(f"engine: {{overlap: {written}}}")
    assert load_settings(config).engine.overlap == read


def test_overlap_is_off_unless_it_is_asked_for() -> None:
    assert load_settings().engine.overlap == "off"
    assert load_settings(engine={"overlap": "on"}).engine.overlap == "on"


def test_overlap_is_never_found_out() -> None:
    with pytest.raises(InvalidArgument, match=r"engine\.overlap"):
        load_settings(engine={"overlap": "auto"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http_port": -1}, "http_port: must be at least 0"),
        ({"http_port": "many"}, "http_port: must be a whole number"),
        ({"engine": {"max_stall": 1.0}}, "engine.max_stall: must be above 1"),
        ({"engine": {"max_stall": "slow"}}, "engine.max_stall: must be a number"),
        ({"engine": {"prefix_cache": "perhaps"}}, "engine.prefix_cache: must be true or false"),
        ({"cluster": {"workers": 65}}, "cluster.workers: must be at most 64"),
        ({"cluster": {"wokers": 1}}, "cluster.wokers: there is no such setting; did you mean workers?"),
        ({"xyz": 1}, "xyz: there is no such setting"),
    ],
)
def test_a_wrong_value_is_told_what_it_must_be(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_settings(**flags)
    assert (caught.value.message, caught.value.field) == (message, message.partition(":")[0])


def test_a_group_of_the_environment_that_is_no_json_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_ENGINE", "fast")
    with pytest.raises(InvalidArgument, match='"engine"'):
        load_settings()


def test_where_a_setting_is_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("device: cpu\ncluster: {workers: 3}\n")
    assert find_written("device", config) == "my.yaml: device cpu"
    assert find_written("cluster.workers", config) == "my.yaml: cluster.workers 3"
    assert find_written("cluster.routers", config) is None
    assert find_written("device", None) is None
    monkeypatch.setenv("moesaic_device", "cuda")
    monkeypatch.setenv("MOESAIC_CLUSTER", '{"routers": 2}')
    assert find_written("device", config) == "moesaic_device=cuda"
    assert find_written("cluster.routers", config) == 'MOESAIC_CLUSTER={"routers": 2}'

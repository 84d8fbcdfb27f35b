"""The settings model: what each source may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.errors import InvalidArgument
from moesaic.settings import load_settings


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

"""Options that are made from settings: their names, what they give, and the page that documents them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from moesaic.options import FIELDS, SettingFlags, default_words, meaning, with_settings
from moesaic.settings import Settings

DOCUMENT = Path(__file__).parents[3] / "docs" / "settings.md"


class Program:
    """A command with some options; it keeps what it was given."""

    def __init__(self) -> None:
        self.app = typer.Typer()
        self.flags: SettingFlags
        self.words: list[str]

        @self.app.command()
        @with_settings(
            "device",
            "cluster.workers",
            "cluster.replicas",
            "engine.batch_invariant",
            "worker.batch_invariant",
            "engine.max_stall",
            defaults={"replicas": 2},
            port="grpc_port",
            allowed_host="gateway.allowed_hosts",
        )
        def main(
            first: Annotated[str, typer.Argument()],
            *,
            flags: SettingFlags,
            other: Annotated[str, typer.Option()] = "nothing",
        ) -> None:
            self.words, self.flags = [first, other], flags

    def run(self, *arguments: str) -> Settings:
        result = CliRunner().invoke(self.app, ["argument", *arguments])
        assert result.exit_code == 0, result.output
        return self.flags.load()

    def help(self) -> str:
        result = CliRunner().invoke(self.app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
        return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_an_option_sets_its_setting_and_leaves_the_others_to_the_other_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOESAIC_CLUSTER__WORKERS", "5")
    monkeypatch.setenv("MOESAIC_DEVICE", "cuda")
    settings = Program().run("--device", "cpu", "--max-stall", "2.5")
    assert (settings.device, settings.cluster.workers, settings.engine.max_stall) == ("cpu", 5, 2.5)


def test_options_may_be_renamed_and_may_repeat() -> None:
    settings = Program().run("--port", "7", "--allowed-host", "a", "--allowed-host", "b")
    assert (settings.grpc_port, settings.gateway.allowed_hosts) == (7, ("a", "b"))


def test_settings_of_one_name_share_an_option() -> None:
    settings = Program().run("--batch-invariant")
    assert settings.engine.batch_invariant and settings.worker.batch_invariant
    settings = Program().run()
    assert not settings.engine.batch_invariant and not settings.worker.batch_invariant


def test_a_default_of_the_command_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CLUSTER__REPLICAS", "5")
    assert Program().run().cluster.replicas == 2
    assert Program().run("--replicas", "3").cluster.replicas == 3


def test_a_file_of_settings_is_read(tmp_path: Path) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("cluster:\n  workers: 6\n")
    program = Program()
    assert program.run("--config", str(config), "--other", "word").cluster.workers == 6
    assert program.words == ["argument", "word"]


def test_what_the_command_fixes_wins_unless_it_is_none() -> None:
    flags = SettingFlags(None, {"device": "cpu", "cluster.workers": 3})
    settings = flags.load(http_port=0, model=None)
    assert (settings.device, settings.cluster.workers, settings.http_port) == ("cpu", 3, 0)


def test_whether_anything_was_given_is_known() -> None:
    assert not SettingFlags(None, {"device": None}).any_given
    assert SettingFlags(None, {"device": "cpu"}).any_given
    assert not SettingFlags(Path("moesaic.yaml"), {"device": None}).any_given


def test_an_error_can_name_a_flag_as_it_was_typed_by_the_setting_that_it_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOESAIC_CLUSTER__WORKERS", "5")
    program = Program()
    program.run("--port", "7", "--batch-invariant", "--allowed-host", "a", "--allowed-host", "b c")
    spell = program.flags.spell
    assert spell is not None
    fields = ("grpc_port", "worker.batch_invariant", "gateway.allowed_hosts", "first", "cluster.workers")
    assert [spell(field) for field in fields] == [
        "--port 7",
        "--batch-invariant",
        "--allowed-host 'a b c'",
        "first 'argument'",
        "MOESAIC_CLUSTER__WORKERS=5",
    ]
    assert [spell(field) for field in ("workers", "device", "unheard_of")] == [
        "MOESAIC_CLUSTER__WORKERS=5",
        "--device",
        None,
    ]


def test_the_help_shows_meanings_values_and_defaults() -> None:
    text = Program().help()
    assert "The device that computes. One of auto, cpu, cuda. [default: (auto)]" in text
    assert "[default: (one per node and GPU)]" in text
    assert "[default: 2]" in text
    assert "[default: (none)]" in text


def test_the_page_of_settings_says_what_the_settings_say() -> None:
    documented = [
        tuple(re.sub(r"`|\[(.+?)\]\(.+?\)", r"\1", cell.strip()) for cell in line.strip("|").split(" | "))
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| `")
    ]
    assert documented == [(key, default_words(field), meaning(field)) for key, field in FIELDS.items()]

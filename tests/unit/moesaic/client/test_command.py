"""The command of an installation of the client alone."""

from __future__ import annotations

import asyncio
import io
import json
import tomllib
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.fake_router import FakeRouter, RunningRouter, running

from cluster.cli.main import main
from moesaic.client import command
from moesaic.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[4]


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    async with running(FakeRouter()) as it:
        yield it


async def run(*arguments: str) -> None:
    await asyncio.to_thread(command.client_command, arguments)


async def test_generate_streams_an_answer(router: RunningRouter, capsys: pytest.CaptureFixture[str]) -> None:
    await run("generate", "abc", "--grpc", router.address, "--max-tokens", "4", "--stop", "x", "--seed", "3")

    assert capsys.readouterr().out == "abca\n"
    [request] = router.router.requests
    assert (request.sampling.seed, list(request.sampling.stop)) == (3, ["x"])
    assert not request.sampling.HasField("temperature")


async def test_generate_ends_at_a_stated_default(
    router: RunningRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    router.router.max_model_len = 1024
    await run("generate", "a", "--grpc", router.address)
    answer = capsys.readouterr().out
    with pytest.raises(SystemExit):
        await run("generate", "--help")

    assert answer == "a" * command.DEFAULT_MAX_TOKENS + "\n"
    assert f"(default: {command.DEFAULT_MAX_TOKENS})" in capsys.readouterr().out


async def test_a_hyphen_takes_the_prompt_from_stdin(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    await run("generate", "-", "--grpc", router.address, "--max-tokens", "2")

    assert capsys.readouterr().out == "ab\n"


async def test_json_is_one_object(router: RunningRouter, capsys: pytest.CaptureFixture[str]) -> None:
    await run("generate", "abc", "--grpc", router.address, "--max-tokens", "4", "--json")
    completion = json.loads(capsys.readouterr().out)
    await run("status", "--grpc", router.address, "--json")
    status = json.loads(capsys.readouterr().out)

    assert (completion["text"], completion["finish_reason"]) == ("abca", "length")
    assert (status["model"]["model"], status["stats"]["generated_tokens"]) == ("fake", 7)


async def test_experts_are_denied_and_allowed_by_name(
    router: RunningRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--deny",
        "maths-v1",
        "--deny",
        "0:3",
        "--allow",
        "law",
        "--top-experts",
        "1",
        "--on-missing",
        "fail",
    )
    await run("generate", "abc", "--grpc", router.address, "--max-tokens", "1", *words, "--json")

    [request] = router.router.requests
    assert request.experts == pb.ExpertPolicy(
        deny=["maths-v1", "0:3"], allow=["law"], top_k=1, on_missing=pb.ON_MISSING_FAIL
    )
    assert json.loads(capsys.readouterr().out)["experts"]["deny"] == ["maths-v1", "0:3"]


async def test_status_says_what_is_served(router: RunningRouter, capsys: pytest.CaptureFixture[str]) -> None:
    await run("status", "--grpc", router.address)

    printed = capsys.readouterr().out
    assert printed.startswith("fake ") and "missing" not in printed
    router.router.parked_sequences = 2
    await run("status", "--grpc", router.address)
    assert "0 running, 0 waiting, 2 wait for a missing expert\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("serve", "FOLDER"), "error: the client has no verb serve: it has generate and status", 2),
        (("status", "--grpc", "localhost"), "error: localhost has no port: give HOST:PORT", 2),
        (("generate", "a", "--grpc", "{closed}"), "error: no router answers at {closed}", 1),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_line(
    arguments: tuple[str, ...], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(FakeRouter()) as gone:
        closed = gone.address
    with pytest.raises(SystemExit) as ended:
        await run(*(argument.format(closed=closed) for argument in arguments))

    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(message.format(closed=closed))


def test_the_servers_command_runs_where_the_server_is_installed() -> None:
    called: list[str] = []

    def installed(name: str) -> Any:
        return Installed(lambda: called.append(name))

    run_server = command.server_command(installed)
    assert run_server is not None
    run_server()

    assert called == ["moesaic-server"]


def test_without_the_server_there_is_no_command_of_the_server() -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    assert command.server_command(missing) is None


def test_the_server_declares_its_command() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]

    assert declared == {"moesaic.command": {"server": "cluster.cli.main:main"}}
    assert callable(main)


class Installed:
    """A distribution that declares one command."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    @property
    def entry_points(self) -> Installed:
        return self

    def select(self, *, group: str) -> list[Installed]:
        return [self] if group == "moesaic.command" else []

    def load(self) -> Callable[[], None]:
        return self._run

"""The address at which a verb finds its server: as `moesaic serve` with the same settings listens."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.closed_ports import closed_port
from typer.testing import CliRunner

from cluster.cli.commands import app
from cluster.cli.router_address import router_address
from moesaic.errors import InvalidArgument
from moesaic.settings import Settings

ASKING = [("status",), ("generate", "x"), ("top", "--once")]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:7"),
        ("0.0.0.0", "127.0.0.1:7"),
        ("::", "[::1]:7"),
        ("fd00::1", "[fd00::1]:7"),
        ("gpu.example", "gpu.example:7"),
    ],
)
def test_a_server_is_asked_where_it_listens(host: str, address: str) -> None:
    assert router_address(None, Settings(host=host, grpc_port=7)) == address
    assert router_address("10.0.0.1:9", Settings(host=host, grpc_port=7)) == "10.0.0.1:9"


def test_a_port_that_the_server_chose_must_be_named() -> None:
    with pytest.raises(InvalidArgument) as refused:
        router_address(None, Settings(grpc_port=0))
    assert refused.value.field == "grpc_port"


@pytest.mark.parametrize("address", ["127.0.0.1", "http://127.0.0.1:1", "127.0.0.1:x", ":5"])
def test_what_is_no_address_is_told(address: str) -> None:
    result = CliRunner().invoke(app, ["status", "--grpc", address])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --grpc {address}: must be HOST:PORT")


@pytest.mark.parametrize("verb", ASKING)
def test_asking_verbs_take_the_address_from_the_environment_and_the_file(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "moesaic.yaml"
    with closed_port() as in_file, closed_port() as in_environment, closed_port() as in_flag:
        config.write_text(f"grpc_port: {in_file}\n")
        result = CliRunner().invoke(app, [*verb, "--config", str(config)])
        assert result.stderr.startswith(f"error: no router answers at 127.0.0.1:{in_file}: ")
        monkeypatch.setenv("MOESAIC_GRPC_PORT", str(in_environment))
        monkeypatch.setenv("MOESAIC_HOST", "localhost")
        result = CliRunner().invoke(app, [*verb, "--config", str(config)])
        assert result.stderr.startswith(f"error: no router answers at localhost:{in_environment}: ")
        result = CliRunner().invoke(app, [*verb, "--grpc", f"127.0.0.1:{in_flag}"])
        assert result.stderr.startswith(f"error: no router answers at 127.0.0.1:{in_flag}: ")


def test_a_running_server_is_measured_through_the_router_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def bench_server(url: str, router: str, *arguments: object) -> None:
        asked.append(router)

    monkeypatch.setattr("cluster.bench.bench.bench_server", bench_server)
    config = tmp_path / "moesaic.yaml"
    config.write_text("grpc_port: 2\n")
    result = CliRunner().invoke(app, ["bench", "--url", "http://127.0.0.1:1", "--config", str(config)])
    assert (result.exit_code, asked) == (0, ["127.0.0.1:2"])

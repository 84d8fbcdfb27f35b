"""The command line: bad input is one line on stderr and exit code 2, and nothing is started for it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import write_mixtral
from support.sparse_checkpoints import TINY_MISTRAL, write_sparse_decoder
from typer.testing import CliRunner

from cluster.cli import main as cli
from cluster.cli.commands import app
from cluster.launch import serve as serving
from moesaic import __version__
from moesaic.settings import Settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("bad input must be told before anything runs")

    monkeypatch.setattr(serving, "running_cluster", start)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    return line


def broken(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def test_an_unknown_folder_is_told() -> None:
    assert refused("serve", "/no/such/folder") == "error: model '/no/such/folder': no such folder"


def test_a_missing_file_of_weights_is_told(tiny: Path, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    (folder / "model.safetensors").unlink()
    assert refused("serve", str(folder)).startswith(f"error: model '{folder}': ")


def test_a_truncated_file_of_weights_is_told(tiny: Path, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert refused("serve", str(folder)).startswith("error: model.safetensors: truncated")


def test_a_config_that_does_not_fit_the_tensors_is_told(tiny: Path, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    assert "num_local_experts" in refused("serve", str(folder))


def test_a_folder_of_pickles_is_told_what_converts_it(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"never read")
    line = refused("serve", str(tmp_path))
    assert line.startswith(f"error: model '{tmp_path}': weights are in consolidated.00.pth")
    assert "moesaic convert FOLDER OUT" in line


def test_workers_for_a_model_that_the_router_computes_alone_are_told(tmp_path: Path) -> None:
    folder = write_sparse_decoder(tmp_path / "dense", TINY_MISTRAL)
    line = refused("serve", str(folder), "--dense-layers", "router", "--workers", "1")
    assert line == "error: --workers 1: the model has no experts for one to hold"


def test_more_workers_than_experts_are_told(tiny: Path) -> None:
    assert refused("serve", str(tiny), "--workers", "9") == (
        "error: --workers 9: 9 workers for 8 experts: at most 8"
    )


def test_more_copies_than_workers_are_told(tiny: Path) -> None:
    assert "--replicas 3: 3 copies" in refused("serve", str(tiny), "--workers", "2", "--replicas", "3")


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_in_use_is_told_with_its_flag(tiny: Path, taken_port: int, flag: str) -> None:
    other = "--grpc-port" if flag == "--http-port" else "--http-port"
    line = refused("serve", str(tiny), flag, str(taken_port), other, "0")
    assert line == f"error: {flag} {taken_port}: 127.0.0.1:{taken_port} is in use; 0 takes a free port"


def test_one_port_for_both_is_told(tiny: Path) -> None:
    line = refused("serve", str(tiny), "--http-port", "7777", "--grpc-port", "7777")
    assert line == "error: --grpc-port 7777: must differ from http_port"


def test_an_unknown_key_in_the_config_file_is_told(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("engine:\n  max_bach_tokens: 1\n")
    assert refused("serve", str(tiny), "--config", str(config)) == (
        "error: moesaic.yaml: engine.max_bach_tokens 1: there is no such setting; did you mean max_batch_tokens?"
    )


def test_a_missing_config_file_is_told(tiny: Path) -> None:
    assert (
        refused("serve", str(tiny), "--config", "/no/such.yaml")
        == "error: --config /no/such.yaml: no such file"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "tpu"), "--device tpu: must be one of auto, cpu, cuda"),
        (("--dtype", "int3"), "--dtype int3: must be one of auto, float32, bfloat16, fp32, bf16"),
        (("--dense-layers", "gateway"), "--dense-layers gateway: must be one of "),
        (("--workers", "0"), "--workers 0: must be at least 1"),
        (("--routers", "65"), "--routers 65: must be at most 64"),
        (("--expert-dtype", "int3"), "--expert-dtype int3: must be one of auto, fp32, bf16, int8, int4, "),
        (("--http-port", "70000"), "--http-port 70000: must be at most 65535"),
        (("--max-model-len", "1000000"), "--max-model-len 1000000: "),
    ],
)
def test_a_value_out_of_bounds_is_told_with_the_flag_as_it_was_typed(
    tiny: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert refused("serve", str(tiny), *arguments).startswith(f"error: {says}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt-len", "x"), "--prompt-len x: must be a number of tokens"),
        (("--concurrency", "0"), "--concurrency 0: "),
        (("--against", "vllm"), "--against vllm: must be transformers"),
        (("--save", "/no/such/file"), "--save /no/such/file: no such folder"),
        (("--url", "127.0.0.1:80"), "--url 127.0.0.1:80: must begin with http://"),
    ],
)
def test_a_wrong_option_that_is_no_setting_is_told_with_its_flag(
    arguments: tuple[str, ...], says: str
) -> None:
    assert refused("bench", *arguments).startswith(f"error: {says}")


def test_a_setting_of_the_environment_or_a_file_is_told_as_such(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text("cluster:\n  workers: 9\n")
    from_file = "error: moesaic.yaml: cluster.workers 9: 9 workers for 8 experts"
    assert refused("serve", str(tiny), "--config", str(config)).startswith(from_file)
    monkeypatch.setenv("MOESAIC_CLUSTER__WORKERS", "0")
    assert refused("serve", str(tiny)) == "error: MOESAIC_CLUSTER__WORKERS=0: must be at least 1"
    assert refused("serve", str(tiny), "--workers", "9").startswith("error: --workers 9: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("cluster: {workers: 1", ": is not YAML, line 1: "),
        ("- 1\n", ": must hold keys and values"),
        ("log_level: 3\n", "log_level 3: must be one of DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_file_that_holds_no_settings_is_told(tiny: Path, tmp_path: Path, content: str, says: str) -> None:
    config = tmp_path / "moesaic.yaml"
    config.write_text(content)
    assert says in refused("serve", str(tiny), "--config", str(config))


@pytest.mark.parametrize("verb", ["serve", "inspect"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "mistralai/Mixtral-8x7B-v0.1",
            "no such folder here; from the hub: hf://mistralai/Mixtral-8x7B-v0.1",
        ),
        ("mixtral", "no such folder here; a model of the hub is hf://ORG/NAME"),
        ("absent.gguf", "no such file, and GGUF is not read"),
        ("model.gguf", "GGUF is not read: a model is a folder of safetensors files"),
        ("config.json", "is a file: name the folder that it is in, ."),
    ],
)
def test_what_is_no_folder_of_a_model_gets_the_sentence_that_helps(
    verb: str, model: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "config.json").touch()
    assert refused(verb, model).startswith(f"error: model '{model}': {says}")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["model.gguf"], "GGUF is not read"),
        (["config.json"], "the folder has no safetensors file: the weights are missing"),
        (["notes.txt"], "the folder has neither config.json nor a safetensors file"),
    ],
)
def test_a_folder_without_a_model_is_told_what_it_lacks(files: list[str], says: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert refused("serve", str(tmp_path)).startswith(f"error: model '{tmp_path}': {says}")


def test_a_model_of_the_hub_is_inspected_as_it_is_served(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, *, revision, allow_patterns: str(tiny)
    )
    result = CliRunner().invoke(app, ["inspect", "hf://tiny/mixtral", "--json"])
    assert json.loads(result.stdout)["family"] == "mixtral"


def test_what_flags_say_reaches_routers_and_workers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []

    async def serve(settings: Settings, model: object, *, as_json: bool) -> None:
        served.append(settings)

    monkeypatch.setattr(serving, "serve", serve)
    flags = ("--routers", "3", "--expert-dtype", "int8", "--batch-invariant", "--dense-layers", "experts")
    ports = ("--http-port", "0", "--grpc-port", "0")
    result = CliRunner().invoke(app, ["serve", str(tiny), *flags, *ports])
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert (settings.cluster.routers, settings.worker.expert_dtype) == (3, "int8")
    assert settings.dense_layers == "experts"
    assert settings.engine.batch_invariant and settings.worker.batch_invariant


def test_with_json_an_error_is_json_too(tiny: Path) -> None:
    error = json.loads(refused("serve", str(tiny), "--workers", "9", "--json"))["error"]
    assert (error["field"], error["reason"]) == ("workers", "INVALID_ARGUMENT")


def test_stopping_needs_the_address_of_a_ray() -> None:
    assert refused("stop").startswith("error: --address: ")


@pytest.mark.parametrize("verb", [("generate", "Hello"), ("status",)])
def test_a_client_verb_without_a_router_says_so_and_fails(verb: tuple[str, ...], closed_address: str) -> None:
    result = CliRunner().invoke(app, [*verb, "--grpc", closed_address])
    assert result.exit_code == 1
    assert result.stderr == f"error: no router answers at {closed_address}: is `moesaic serve` running?\n"


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moesaic {__version__}\n")


# Stands for an address at which nothing listens.
CLOSED = "closed"
HEAVY = ("fastapi", "ray", "torch", "transformers")
RUN = """
import sys
sys.argv = ["moesaic", *{arguments!r}]
from cluster.cli.main import main
try:
    main()
finally:
    print("imported:", *sorted({packages!r} & sys.modules.keys()))
"""


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, which says on stdout at the end what of HEAVY it has imported."""
    return subprocess.run(
        [sys.executable, "-c", before + RUN.format(arguments=arguments, packages=set(HEAVY))],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("serve", "--help"), 0),
        (("--version",), 0),
        (("status", "--grpc", CLOSED), 1),
        (("generate", "x", "--grpc", CLOSED), 1),
        (("top", "--once", "--grpc", CLOSED), 1),
        (("serve", "/no/such/folder"), 2),
    ],
)
def test_what_starts_no_process_imports_neither_ray_nor_torch(
    arguments: tuple[str, ...], code: int, closed_address: str
) -> None:
    done = run(*(closed_address if one == CLOSED else one for one in arguments))
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_server_says_that_it_starts_before_it_imports_anything_large() -> None:
    done = run("serve", before='import sys; sys.modules["typer"] = sys.modules["pydantic"] = None')
    assert done.stderr.splitlines()[0] == "Moesaic: starting"
    assert done.stderr.splitlines()[1].startswith("error: the command needs ")


@pytest.mark.parametrize("option", ["--json", "--help"])
def test_who_asks_for_json_or_help_is_told_nothing_else(option: str) -> None:
    assert "starting" not in run("serve", "/no/such/folder", option).stderr


def test_a_client_install_says_what_the_command_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "cluster.cli.commands")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert (
        capsys.readouterr().err
        == "error: the command needs typer; from a checkout: pip install ./moesaic .\n"
    )


def test_every_verb_with_a_cluster_of_its_own_takes_the_same_options(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Settings] = []

    async def run_demo(prompt: object, settings: Settings, **options: object) -> None:
        ran.append(settings)

    async def run_bench(settings: Settings, *arguments: object) -> None:
        ran.append(settings)

    async def serve(settings: Settings, *arguments: object, **options: object) -> None:
        ran.append(settings)

    monkeypatch.setattr("cluster.cli.demo.run_demo", run_demo)
    monkeypatch.setattr("cluster.bench.bench.bench_own_cluster", run_bench)
    monkeypatch.setattr(serving, "serve", serve)
    flags = (
        "--workers",
        "2",
        "--replicas",
        "2",
        "--dtype",
        "bf16",
        "--expert-dtype",
        "float32",
        "--device",
        "cpu",
    )
    for verb in (
        ("serve", str(tiny), "--http-port", "0", "--grpc-port", "0"),
        ("demo",),
        ("bench", str(tiny)),
    ):
        result = CliRunner().invoke(app, [*verb, *flags, "--max-model-len", "9", "--batch-invariant"])
        assert result.exit_code == 0, result.output
    assert len(ran) == 3
    for settings in ran:
        assert (settings.cluster.workers, settings.cluster.replicas) == (2, 2)
        assert (settings.dtype, settings.worker.expert_dtype, settings.device) == ("bfloat16", "fp32", "cpu")
        assert settings.engine.max_model_len == 9
        assert settings.engine.batch_invariant and settings.worker.batch_invariant


def test_a_demo_has_four_workers_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Settings] = []

    async def run_demo(prompt: object, settings: Settings, **options: object) -> None:
        ran.append(settings)

    monkeypatch.setattr("cluster.cli.demo.run_demo", run_demo)
    monkeypatch.setenv("MOESAIC_CLUSTER__WORKERS", "7")
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    (settings,) = ran
    assert (settings.cluster.workers, settings.cluster.routers, settings.cluster.replicas) == (4, 1, 2)

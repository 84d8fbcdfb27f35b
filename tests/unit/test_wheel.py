"""What people install: a wheel of the client alone, and one of the server beside it; together the whole project."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fake_router import FakeRouter, running

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "expert_worker", "gateway", "moesaic", "router")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# What the client's wheel must not bring along is measured in megabytes.
CLIENT_BYTES = 300_000
BUNDLE_FILES = ("manifest.json", "weights.safetensors")
# What the story of the demo's bundles may add to an install.
DEMO_BYTES = 12_000_000
# Of the client's modules, those that only a server imports, with packages that the client does not install.
OF_A_SERVER = {"moesaic.machine_memory", "moesaic.options", "moesaic.settings", "moesaic.spelling"}


@dataclass(frozen=True)
class Wheel:
    path: Path
    files: frozenset[Path]

    @property
    def modules(self) -> frozenset[Path]:
        return frozenset(path for path in self.files if path.suffix == ".py")


BUILD_EDITABLE = (
    "import sys; from setuptools import build_meta; "
    "print(build_meta.build_editable(sys.argv[1], {'editable_mode': sys.argv[2]}))"
)
FIND_CLIENT = (
    "import site, sys; sys.path.insert(0, ''); site.addsitedir(sys.argv[1]); "
    "import importlib.util; print(importlib.util.find_spec('moesaic').origin)"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests", "benchmarks", "ops"):
        shutil.copytree(ROOT / name, copy / name, ignore=no_caches, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def client(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(checkout / "moesaic", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def server(checkout: Path, client: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    # The client's wheel is built first, as `pip install ./moesaic .` does: nothing of it may slip in.
    return build(checkout, tmp_path_factory.mktemp("server"))


def build(project: Path, out: Path, *, hook: str = "build_wheel") -> Wheel:
    command = [sys.executable, "-c", BUILD, hook, str(out)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=240)
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Wheel(wheel, frozenset(Path(name) for name in archive.namelist()))


def folders(paths: Iterable[Path]) -> set[str]:
    return {path.parts[0] for path in paths if not path.parts[0].endswith(".dist-info")}


def test_the_clients_wheel_holds_the_client_alone(client: Wheel) -> None:
    assert folders(client.files) == {"moesaic"}
    assert {path.parent for path in client.modules} == {
        Path("moesaic"),
        Path("moesaic/client"),
        Path("moesaic/v1"),
    }
    assert client.path.stat().st_size < CLIENT_BYTES


def test_the_clients_wheel_holds_the_types(client: Wheel) -> None:
    assert {"py.typed", "common_pb2.pyi", "inference_pb2.pyi"} <= {path.name for path in client.files}


def test_the_servers_wheel_holds_our_packages_and_no_other(server: Wheel) -> None:
    assert folders(server.files) == set(PACKAGES)


def test_the_two_wheels_share_no_file(client: Wheel, server: Wheel) -> None:
    shared = client.files & server.files

    assert not {path for path in shared if not path.parts[0].endswith(".dist-info")}


def test_the_two_wheels_hold_every_module_of_the_checkout(client: Wheel, server: Wheel) -> None:
    modules = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert client.modules | server.modules == modules


def test_the_servers_wheel_holds_the_demo_model(server: Wheel) -> None:
    data = {path.name for path in server.files if path.suffix != ".py"}

    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= data


def test_the_servers_wheel_holds_the_demos_bundles_and_texts(server: Wheel) -> None:
    names = {
        *(f"demo_bundles/{bundle}/{file}" for bundle in ("maths-v1", "maths-v2") for file in BUNDLE_FILES),
        *(f"demo_texts/{name}.txt" for name in ("arithmetic", "drama", "speech")),
    }

    assert {Path("cluster", name) for name in names} <= server.files
    assert sum((ROOT / "cluster" / name).stat().st_size for name in names) < DEMO_BYTES


def test_building_leaves_nothing_in_the_clients_package(checkout: Path, client: Wheel) -> None:
    assert {path.name for path in (checkout / "moesaic").iterdir()} <= {
        path.name for path in (ROOT / "moesaic").iterdir()
    }


def test_an_editable_server_puts_the_checkout_on_the_path_and_hides_no_part_of_the_client(
    checkout: Path, tmp_path: Path
) -> None:
    editable = build(checkout, tmp_path, hook="build_editable")
    [path_file] = [path for path in editable.files if path.suffix == ".pth"]

    assert not editable.modules
    with zipfile.ZipFile(editable.path) as archive:
        assert archive.read(str(path_file)).decode().strip() == str(checkout)


def test_client_and_server_want_each_other_in_their_own_version() -> None:
    client, server = project(ROOT / "moesaic"), project(ROOT)

    assert client["version"] == server["version"]
    assert f"moesaic=={client['version']}" in server["dependencies"]
    assert client["optional-dependencies"] == {
        "serve": [f"moesaic-server=={client['version']}"],
        "mistral": [f"moesaic-server[mistral]=={client['version']}"],
        "bench": [f"moesaic-server[bench]=={client['version']}"],
    }
    assert client["requires-python"] == server["requires-python"]


def test_what_both_may_need_is_wanted_in_one_version() -> None:
    client, server = (
        {name_of(line): line for line in project(folder)["dependencies"]}
        for folder in (ROOT / "moesaic", ROOT)
    )

    assert all(client[name] == server[name] for name in client.keys() & server.keys())


def name_of(requirement: str) -> str:
    return requirement.partition(">")[0].partition("=")[0].partition("[")[0]


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


# Stands before a program that is run from the client's wheel: what the client does not install is not there.
WITHOUT_THE_SERVER = """
import sys
for name in ("torch", "ray", "transformers", "numpy", "pydantic", "typer", "rich", "fastapi", "uvicorn", "grpc_health",
             "h2", "router", "expert_worker", "gateway", "cluster"):
    sys.modules[name] = None  # the import machinery raises ImportError for it
"""


def run_client(wheel: Wheel, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the client's wheel in place of the checkout."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_SERVER + program, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=wheel.path.parent,
        env={**os.environ, "PYTHONPATH": str(wheel.path)},
    )


def test_every_module_of_the_client_needs_no_more_than_the_client_installs(client: Wheel) -> None:
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in client.modules}
    program = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"

    result = run_client(client, program, *sorted(names - OF_A_SERVER))

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "output"), [(("generate", "ab", "--max-tokens", "5"), "ababa\n"), (("status",), "fake ")]
)
async def test_the_command_works_from_the_clients_wheel(
    client: Wheel, arguments: tuple[str, ...], output: str
) -> None:
    program = "from moesaic.client.command import client_command; client_command()"

    async with running(FakeRouter()) as router:
        result = await asyncio.to_thread(run_client, client, program, *arguments, "--grpc", router.address)

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(output)

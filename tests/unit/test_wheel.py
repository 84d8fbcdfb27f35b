"""What people install: the wheel holds the packages of this project and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "expert_worker", "gateway", "moesaic", "router")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

BUILD_EDITABLE = (
    "import sys; from setuptools import build_meta; "
    "print(build_meta.build_editable(sys.argv[1], {'editable_mode': sys.argv[2]}))"
)
FIND_CLIENT = (
    "import site, sys; sys.path.insert(0, ''); site.addsitedir(sys.argv[1]); "
    "import importlib.util; print(importlib.util.find_spec('moesaic').origin)"
)


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[Path]:
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    copy_sources(checkout, (*PACKAGES, "tests", "benchmarks", "ops"))
    with zipfile.ZipFile(build(checkout, out, BUILD)) as archive:
        return {Path(name) for name in archive.namelist()}


def copy_sources(checkout: Path, folders: Sequence[str]) -> None:
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in folders:
        shutil.copytree(ROOT / name, checkout / name, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)


def build(checkout: Path, out: Path, program: str, *arguments: str) -> Path:
    command = [sys.executable, "-c", program, str(out), *arguments]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=120)
    [wheel] = out.glob("*.whl")
    return wheel


def test_a_program_beside_a_clone_named_moesaic_finds_the_client(tmp_path: Path) -> None:
    """The folder of the clone is no package, but Python takes it for one where nothing comes before it."""
    clone, site = tmp_path / "moesaic", tmp_path / "site"
    clone.mkdir()
    copy_sources(clone, PACKAGES)
    mode = re.search(r"editable_mode=(\w+)", (ROOT / "Makefile").read_text())
    assert mode is not None
    out = tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(build(clone, out, BUILD_EDITABLE, mode[1])) as archive:
        archive.extractall(site)
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", FIND_CLIENT, str(site)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert Path(found.stdout.strip()) == clone / "moesaic" / "__init__.py"


def test_the_wheel_holds_our_packages_and_no_other(wheel_files: set[Path]) -> None:
    folders = {path.parts[0] for path in wheel_files}

    assert {name for name in folders if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_module_of_the_checkout(wheel_files: set[Path]) -> None:
    modules = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert {path for path in wheel_files if path.suffix == ".py"} == modules


def test_the_wheel_holds_the_demo_model_and_the_types(wheel_files: set[Path]) -> None:
    data = {path.name for path in wheel_files if path.suffix != ".py"}

    assert {
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "py.typed",
        "common_pb2.pyi",
    } <= data

"""What people install: the wheel holds the packages of this project and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "expert_worker", "gateway", "moesaic", "router")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[Path]:
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests", "benchmarks", "ops"):
        shutil.copytree(ROOT / name, checkout / name, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=120)
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name) for name in archive.namelist()}


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

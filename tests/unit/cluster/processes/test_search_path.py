"""No module is taken from the working directory, by the command or by anything that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.processes.search_path import HOME

REPORT = (
    "import json, os, sys\n"
    "from cluster.processes.search_path import leave_out_working_directory, own_search_path\n"
    "leave_out_working_directory()\n"
    "child = [sys.executable, '-m', 'harmless']\n"
    "print(json.dumps([sys.path, os.environ['PYTHONPATH'], own_search_path(), os.spawnv(os.P_WAIT, child[0], child)]))"
)


def report(folder: Path, python_path: str) -> tuple[list[str], str, list[str], int]:
    """Of a program that is run with the working directory on its path, as `python -m` and `-c` do it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=folder,
        env={**environment, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    path, for_children, own, code = json.loads(done.stdout)
    return path, for_children, own, code


@pytest.mark.parametrize("spelling", ["{home}", "{home}:", ":{home}", ".:{home}", "{home}::.."])
def test_neither_the_program_nor_its_children_look_in_the_working_directory(
    spelling: str, tmp_path: Path
) -> None:
    (tmp_path / "harmless.py").write_text("")
    path, for_children, own, code = report(tmp_path, spelling.format(home=HOME))
    assert str(tmp_path) not in path
    assert "" not in path
    assert for_children == HOME
    assert own == [HOME]
    assert code != 0  # a child finds no module there either


def test_a_folder_that_is_named_in_full_stays(tmp_path: Path) -> None:
    path, for_children, _, _ = report(tmp_path, f"{tmp_path}:{HOME}")
    assert str(tmp_path) in path
    assert for_children == f"{tmp_path}:{HOME}"


def test_a_source_tree_that_is_the_working_directory_stays() -> None:
    path, for_children, own, _ = report(Path(HOME), "")
    assert HOME in path
    assert for_children == HOME
    assert own == [HOME]

"""A folder lives as long as its owner, and not much longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.private_folder import LOCK, PREFIX, PrivateFolder, private_folder


def test_a_folder_is_closed_to_others_and_goes_with_its_owner(tmp_path: Path) -> None:
    folder = PrivateFolder.create(tmp_path)
    assert folder.path.stat().st_mode & 0o077 == 0
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys\n"
        "from moesaic.private_folder import PrivateFolder\n"
        "folder = PrivateFolder.create(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=240, check=False)
    (dead,) = tmp_path.iterdir()
    folder = PrivateFolder.create(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path] != [dead]
    folder.remove()


def test_what_belongs_to_a_living_process_or_to_somebody_else_stays(tmp_path: Path) -> None:
    living = PrivateFolder.create(tmp_path)
    unknown, elsewhere, pointing = (tmp_path / name for name in (f"{PREFIX}1", "elsewhere", f"{PREFIX}2"))
    for folder in (unknown, elsewhere, pointing):
        folder.mkdir()
    (elsewhere / "file").touch()
    (pointing / LOCK).symlink_to(elsewhere / "file")
    PrivateFolder.create(tmp_path).remove()
    assert living.path.exists() and unknown.exists() and pointing.exists()
    living.remove()


def test_where_none_can_be_made_it_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PrivateFolder.create(tmp_path / "none")


def test_a_folder_of_a_block_lies_where_temporary_files_do_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with private_folder() as folder:
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []

"""The folder of a server: private, short, and swept after its owner was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes.server_folder import (
    MAX_PLACE,
    MAX_SOCKET_PATH,
    ServerFolder,
    places,
)
from moesaic.errors import Unavailable
from moesaic.private_folder import LOCK

NOBODY = 65_534


@pytest.fixture
def place() -> Iterator[Path]:
    """A short one."""
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def killed_owner(place: Path) -> Path:
    """The folder that a killed process has left."""
    program = (
        "import os, pathlib, signal, sys\n"
        "from cluster.processes.server_folder import ServerFolder\n"
        "folder = ServerFolder.create([pathlib.Path(sys.argv[1])])\n"
        "(folder.ray / 'log').write_text('x')\n"
        "print(folder.path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)], capture_output=True, text=True, timeout=240
    )
    return Path(done.stdout.strip())


def test_a_socket_of_ray_fits_below_the_longest_place_that_is_taken() -> None:
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as short:
        longest = Path(short) / ("x" * (MAX_PLACE - len(short) - 1))
        longest.mkdir()
        folder = ServerFolder.create([longest])
        socket = folder.ray / "session_2026-12-31_23-59-59_999999_4194304" / "sockets" / "plasma_store"
        assert len(os.fsencode(socket)) <= MAX_SOCKET_PATH
        folder.remove()


def test_a_place_that_is_too_long_or_missing_or_open_is_passed_over(place: Path) -> None:
    long, shared = place / ("long" * 30), place / "shared"
    long.mkdir()
    shared.mkdir()
    shared.chmod(0o777)
    folder = ServerFolder.create([long, place / "missing", shared, place])
    assert folder.path.parent == place
    folder.remove()
    assert not folder.path.exists()


def test_where_no_place_will_do_the_error_says_why_each_will_not(place: Path) -> None:
    with pytest.raises(Unavailable, match=r"TMPDIR: .*no cannot be used.*at most") as refused:
        ServerFolder.create([place / "no"])
    assert refused.value.field == "TMPDIR"


def test_the_place_of_choice_is_tmpdir_and_then_the_usual_ones() -> None:
    assert places({"TMPDIR": "/scratch"}) == (Path("/scratch"), Path("/tmp"), Path("/var/tmp"))
    assert places({}) == (Path("/tmp"), Path("/var/tmp"))


def test_the_folder_of_a_killed_server_is_removed_by_the_next_one(place: Path) -> None:
    dead = killed_owner(place)
    assert (dead / "ray" / "log").exists()
    folder = ServerFolder.create([place])
    assert not dead.exists()
    folder.remove()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another user")
def test_nothing_of_it_can_be_touched_by_another_user(place: Path) -> None:
    folder = ServerFolder.create([place])
    folder.ray.chmod(0o777)  # as Ray does it
    attempts = ("ls {0}", "ls {0}/ray", "mkdir {0}/ray/sockets", "mv {0} {0}x", "cat {0}/owner.lock")
    for attempt in attempts:
        command = attempt.format(folder.path)
        done = subprocess.run(
            command.split(), user=NOBODY, cwd="/", capture_output=True, text=True, timeout=240
        )
        assert "Permission denied" in done.stderr, command
    folder.remove()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another user")
def test_the_folder_of_another_user_is_not_removed(place: Path) -> None:
    dead = killed_owner(place)
    os.chown(dead, NOBODY, NOBODY)
    os.chown(dead / LOCK, NOBODY, NOBODY)
    ServerFolder.create([place]).remove()
    assert dead.exists()

"""Files in shared memory: who finds them, who may see them, and when they go."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.kept_folder import KEEP_S, PREFIX, KeptFolder, NoRoom, sweep

CONTENT = b"weights" * 1000


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def write(folder: KeptFolder, name: str, content: bytes = CONTENT) -> Path:
    return folder.write(name, [content[:5], content[5:]], len(content))


def pool(place: Path) -> set[str]:
    return {path.name for path in (place / f"{PREFIX}{os.getuid()}" / "pool").iterdir()}


def die_with(place: Path, *names: str) -> None:
    """A process that writes these files and is killed."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom moesaic.kept_folder import KeptFolder\n"
        "folder = KeptFolder.open(Path(sys.argv[1]))\n"
        "for name in sys.argv[2:]: folder.write(name, [b'left'], 4)\n"
        "folder.tend()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(place), *names], timeout=60).returncode == -9


def test_a_file_is_written_once_and_found_by_another_process(tmp_path: Path) -> None:
    first, second = KeptFolder.open(tmp_path), KeptFolder.open(tmp_path)
    path, again = write(first, "a"), write(second, "a", b"never written")
    assert again.read_bytes() == CONTENT
    assert path.stat().st_ino == again.stat().st_ino
    assert second.find("b") is None
    first.close()
    second.close()


def test_nobody_else_can_enter_the_folder_and_nobody_can_write_to_a_file(tmp_path: Path) -> None:
    folder = KeptFolder.open(tmp_path)
    write(folder, "a")
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.name == "owner.lock" else 0o400), path
    folder.close()


def test_a_folder_that_others_can_enter_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(PermissionError):
        KeptFolder.open(tmp_path)


def test_what_is_dropped_goes_with_its_last_user(tmp_path: Path) -> None:
    first, second = KeptFolder.open(tmp_path), KeptFolder.open(tmp_path)
    write(first, "a")
    write(second, "a")
    first.drop("a")
    assert pool(tmp_path) == {"a"}
    second.drop("a")
    assert pool(tmp_path) == set()
    first.drop("a")  # is no error
    first.close()
    second.close()


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    folder = KeptFolder.open(tmp_path)
    write(folder, "a")
    folder.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_a_killed_process_left_goes_when_its_successor_uses_all_of_it(tmp_path: Path) -> None:
    die_with(tmp_path, "a", "b")
    folder = KeptFolder.open(tmp_path)
    assert folder.find("a") is not None
    folder.tend()
    assert pool(tmp_path) == {"a", "b"}  # b may be awaited by another one
    assert folder.find("b") is not None
    folder.tend()
    folder.drop("b")
    assert pool(tmp_path) == {"a"}
    folder.close()
    assert pool(tmp_path) == set()


def test_what_nobody_has_taken_over_goes_after_a_while(tmp_path: Path) -> None:
    die_with(tmp_path, "a")
    lock = next(tmp_path.rglob("owner.lock"))
    clock = Clock()
    os.utime(lock, (clock.now, clock.now))
    clock.now += KEEP_S - 1
    folder = KeptFolder.open(tmp_path, clock=clock)
    assert pool(tmp_path) == {"a"}
    clock.now += 2
    folder.tend()
    assert pool(tmp_path) == set()
    folder.close()


def test_the_living_keep_theirs_however_long_they_live(tmp_path: Path) -> None:
    clock = Clock()
    old = KeptFolder.open(tmp_path, clock=clock)
    write(old, "a")
    clock.now += 100 * KEEP_S
    KeptFolder.open(tmp_path, clock=clock).close()
    sweep(tmp_path)
    assert pool(tmp_path) == {"a"}
    old.close()


def test_sweeping_removes_all_that_the_dead_have_left(tmp_path: Path) -> None:
    sweep(tmp_path)  # there is nothing yet
    die_with(tmp_path, "a")
    sweep(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_beyond_the_limit_nothing_is_written(tmp_path: Path) -> None:
    folder = KeptFolder.open(tmp_path, max_bytes=len(CONTENT) + 5)
    write(folder, "a")
    with pytest.raises(NoRoom):
        write(folder, "b")
    folder.drop("a")
    write(folder, "b")
    other = KeptFolder.open(tmp_path, max_bytes=len(CONTENT) + 5)
    with pytest.raises(NoRoom):  # what others keep counts
        write(other, "c")
    folder.close()
    other.close()


def test_a_full_place_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = KeptFolder.open(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoRoom, match="No space left"):
        write(folder, "a")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"owner.lock"}
    folder.close()


def test_a_file_that_is_discarded_is_not_found_again(tmp_path: Path) -> None:
    folder = KeptFolder.open(tmp_path)
    write(folder, "a")
    folder.discard("a")
    assert folder.find("a") is None
    assert write(folder, "a", b"new").read_bytes() == b"new"
    folder.close()

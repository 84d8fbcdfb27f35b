"""The memory of a machine, and of a container on it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from moesaic.machine_memory import read_memory

MIB = 1 << 20


def test_without_a_group_the_machine_is_the_limit(tmp_path: Path) -> None:
    limit, available = read_memory(tmp_path)
    assert limit == psutil.virtual_memory().total + psutil.swap_memory().total
    assert 0 < available <= limit


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "104857600\n", "memory.current": "41943040\n"}, (100, 60)),
        (
            {
                "memory.max": "104857600\n",
                "memory.current": "41943040\n",
                "memory.stat": "anon 7\ninactive_file 20971520\n",
            },
            (100, 80),
        ),
        (
            {"memory/memory.limit_in_bytes": "104857600", "memory/memory.usage_in_bytes": "209715200"},
            (100, 0),
        ),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, files: dict[str, str], expected: tuple[int, int]
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    limit, available = read_memory(tmp_path)
    assert (limit // MIB, available // MIB) == expected


def test_a_group_without_a_limit_has_none(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory(tmp_path)[0] == psutil.virtual_memory().total + psutil.swap_memory().total

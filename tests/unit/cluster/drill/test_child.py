"""A started program says that it is ready, and nothing of it is left when it has ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.drill import child as children
from cluster.drill.child import Child
from moesaic.errors import Unavailable

# A program that starts another one, which does not end by itself.
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", flush=True)
time.sleep(600)
"""


async def test_what_a_program_started_and_left_behind_is_killed_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "AFTERMATH_S", 0.2)
    child = await Child.start("parent", (sys.executable, "-c", PARENT), tmp_path)
    assert await child.first_line(30.0) == "ready"
    assert len(child.members()) == 2
    assert await child.end() == 1
    assert child.has_ended
    assert child.members() == []


async def test_a_program_that_ends_before_it_is_ready_is_quoted(tmp_path: Path) -> None:
    child = await Child.start("short", (sys.executable, "-c", "raise SystemExit('no model')"), tmp_path)
    with pytest.raises(Unavailable, match="short ended before it was ready: no model"):
        await child.first_line(30.0)
    assert await child.end() == 0


async def test_settings_of_the_environment_do_not_reach_a_program_that_has_them_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_HTTP_PORT", "1")
    program = "import os; print([key for key in os.environ if key.startswith('MOESAIC_')])"
    child = await Child.start("environment", (sys.executable, "-c", program), tmp_path)
    assert await child.first_line(30.0) == "[]"
    await child.end()

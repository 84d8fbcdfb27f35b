"""The programs of docs/python.md run as they are pasted; only the address of the router is another."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_router import FakeRouter, running

ROOT = Path(__file__).parents[2]
PROGRAMS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.M)
ONCE = "Once upon a timeOnce upon a time\n"
POLICY = "2+3=\n[(True, 0, 4)]\n"
OUTPUTS = (ONCE, ONCE, "To be, o length 8\n", POLICY, "temperature is wrong: ")


@pytest.mark.parametrize(("program", "output"), list(zip(PROGRAMS, OUTPUTS, strict=True)))
async def test_a_program_of_the_page_runs_as_pasted(program: str, output: str, tmp_path: Path) -> None:
    async with running(FakeRouter()) as router:
        (tmp_path / "program.py").write_text(program.replace("127.0.0.1:50051", router.address))
        result = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "program.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(output)

"""The examples of docs/api.md work as they are pasted; only the addresses are others."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.gateway_site import Site

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)
OUTPUTS = ("2+3= {'deny': ['maths-v1']}\n4 tokens by one version\n", "2+3= ('maths-v1', '1:7') 4\n")


@pytest.mark.parametrize(("program", "output"), list(zip(PROGRAMS, OUTPUTS, strict=True)))
async def test_a_program_of_the_page_runs_as_pasted(
    site: Site, program: str, output: str, tmp_path: Path
) -> None:
    program = program.replace("127.0.0.1:8000", site.address).replace("127.0.0.1:50051", site.link.address)
    (tmp_path / "program.py").write_text(program)
    result = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, output), result.stderr


async def test_the_body_that_curl_sends_gets_the_reply_that_the_page_tells(http: httpx.AsyncClient) -> None:
    (body,) = re.findall(r"-d '(\{.*?\})'\n```", PAGE, re.DOTALL)[:1]
    reply = (await http.post("/v1/completions", json=json.loads(body))).json()
    assert f'"experts": {json.dumps(reply["moesaic"]["experts"])}' in PAGE
    (span,) = reply["choices"][0]["weight_versions"]
    assert f'"start": {span["start"]}, "end": {span["end"]}' in PAGE

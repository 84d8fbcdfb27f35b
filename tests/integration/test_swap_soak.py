"""`make soak-swaps`, short: the program finds nothing wrong with changes in a row under load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_experts_that_change_in_a_row_under_load_fail_no_request_and_mix_no_versions(tmp_path: Path) -> None:
    program = (sys.executable, str(ROOT / "benchmarks" / "swap_soak.py"))
    done = subprocess.run(
        [
            *program,
            "--changes",
            "12",
            "--pause",
            "0.5",  # so long that answers of every epoch come, on a slow machine, too
            "--routers",
            "2",
            "--replicas",
            "2",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads((tmp_path / "swap_soak.json").read_text())
    values = {figure["key"]: figure["value"] for figure in result["figures"]}
    assert [values[f"swap-soak-{key}"] for key in ("failed", "mixed", "wrong", "held")] == [0, 0, 0, 0]
    # Several epochs were in use, with answers of their own, or all this would prove nothing.
    assert len(result["data"]["answers by bundles"]) > 2
    assert result["data"]["different answers"] > 2 * result["data"]["prompts"]

"""Runs `moesaic demo --json` as a user does, and returns its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_demo(*flags: str) -> dict[str, Any]:
    """The report of one demo: milestones_s, answer, phases_s, workers."""
    command = [str(Path(sys.executable).with_name("moesaic")), "demo", "--json", *flags]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    report: dict[str, Any] = json.loads(printed)
    return report

"""`moesaic bench` as people start it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.serve_command import END_TIMEOUT_S, MOESAIC, START_TIMEOUT_S

from router.phase_clock import Phase

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def printed(*arguments: str, temp: str) -> dict[str, Any]:
    """The JSON that a verb prints."""
    done = subprocess.run(
        [*MOESAIC, *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S + END_TIMEOUT_S,
        env=os.environ | {"TMPDIR": temp},
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def test_the_built_in_model_is_measured_beside_transformers_and_gives_the_same_tokens(
    tmp_path: Path,
) -> None:
    chart = tmp_path / "chart.png"
    flags = ("--concurrency", "2", "--requests", "4", "--prompt-len", "8", "--output-len", "6")
    # A short path, for Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        found = printed(
            "bench",
            *flags,
            *("--workers", "2", "--chart", str(chart)),
            *("--against", "transformers", "--pairs", "1"),
            temp=temp,
        )
    (row,), (duel,) = found["rows"], found["duels"]
    assert (row["load"]["requests"], row["load"]["failed_requests"]) == (4, 0)
    assert (row["load"]["prompt_tokens"], row["load"]["output_tokens"]) == (32, 24)
    assert row["load"]["inter_token"]["p99_ms"] >= row["load"]["inter_token"]["p50_ms"] > 0
    profile = row["profile"]
    assert list(profile["phases_ms"]) == list(Phase)
    assert profile["phases_ms"]["worker compute"] > 0
    assert profile["bytes_per_token"] > 0
    assert [worker["name"] for worker in profile["workers"]] == ["expert-worker-0", "expert-worker-1"]
    assert (duel["sequences"], duel["same_sequences"], duel["failed_pairs"]) == (2, 2, 0)
    assert chart.read_bytes().startswith(b"\x89PNG")

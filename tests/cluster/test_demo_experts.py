"""`moesaic demo-experts` as people start it: a sum that the model gets wrong before and right after, and no trace left."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

import pytest
from support.serve_command import END_TIMEOUT_S, MOESAIC, START_TIMEOUT_S

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_experts_for_arithmetic_come_get_better_are_refused_and_go_without_a_trace() -> None:
    # A short path, for Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        done = subprocess.run(
            [*MOESAIC, "demo-experts", "--json"],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S + END_TIMEOUT_S + 120,
            env=os.environ | {"TMPDIR": temp},
            start_new_session=True,
        )
    assert done.returncode == 0, done.stderr
    before, added, swapped, denied, removed = json.loads(done.stdout)["steps"]
    assert before["answers"]["12 + 7 ="] != "19" == swapped["answers"]["12 + 7 ="]
    assert before["sums_right"] <= added["sums_right"] < swapped["sums_right"]
    assert swapped["perplexity"]["arithmetic"] < added["perplexity"]["arithmetic"]
    assert added["perplexity"]["arithmetic"] < before["perplexity"]["arithmetic"] / 10
    for name in ("drama", "speech"):
        assert swapped["perplexity"][name] < 1.1 * before["perplexity"][name]
    for step in (denied, removed):
        assert step["equal_to_before"] is True
        assert (step["perplexity"], step["answers"]) == (before["perplexity"], before["answers"])

"""`moesaic demo` as people start it: a worker dies in the middle of an answer, and no letter of it changes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

import psutil
import pytest
from support.serve_command import END_TIMEOUT_S, MOESAIC, START_TIMEOUT_S

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_a_worker_is_killed_in_mid_answer_and_the_text_is_the_same() -> None:
    # A short path, for Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        done = subprocess.run(
            [*MOESAIC, "demo", "--json", "--max-tokens", "60"],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S + END_TIMEOUT_S + 120,
            env=os.environ | {"TMPDIR": temp},
            start_new_session=True,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        shares = {worker["name"]: worker["rows"] for worker in report["workers"]}
        drill = report["drill"]
        assert len(shares) == 4 and shares[drill["worker"]] == max(shares.values()) > 0
        assert drill["same_text"] is True
        assert drill["killed_after_tokens"] == report["answer"]["num_tokens"] // 3
        assert drill["longest_pause_s"] > 0
        assert drill["back_after_s"] is not None
        assert not psutil.pid_exists(drill["pid"])
        assert "(raylet)" not in done.stderr

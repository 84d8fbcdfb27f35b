"""`python -m router`: what a person who starts one gets, and what a wrong start says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import write_mixtral
from support.processes import running_router, running_workers

from moesaic import SyncClient
from moesaic.errors import InvalidArgument


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{tmp}/nowhere", "--worker", "127.0.0.1:1"], "model: no such folder"),
        (["--model", "{tmp}/tiny"], "name either workers (--worker) or a controller (--control)"),
        (
            ["--model", "{tmp}/tiny", "--worker", "127.0.0.1:1", "--max-model-len", "99999"],
            "max_model_len: the model's context has 256 tokens",
        ),
    ],
)
def test_a_wrong_start_says_why_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    write_mixtral(tmp_path / "tiny")
    command = [sys.executable, "-m", "router", "--port", "0", *(flag.format(tmp=tmp_path) for flag in flags)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    errors = [line for line in run.stderr.splitlines() if not line.startswith("{")]
    assert (run.returncode, run.stdout, errors) == (2, "", [f"error: {message}"])


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny")
    with running_workers(folder, ["all"]) as workers, running_router(folder, workers) as router:
        with SyncClient(router.address) as client:
            answer = client.complete([1, 2, 3], max_tokens=4, temperature=0)
            assert len(answer.token_ids) == 4 and answer.text == ""
            with pytest.raises(InvalidArgument):
                client.complete([96], max_tokens=1)
        assert router.stop() == 0

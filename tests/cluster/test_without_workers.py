"""`moesaic serve --dense-layers router`: a dense model without a single expert worker, and the verbs that look at it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.dense_checkpoints import write_mistral
from support.serve_command import MOESAIC, Serve, serving

from moesaic import SyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROMPT = [5, 17, 42, 8]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """It must end cleanly on SIGTERM."""
    folder: Path = write_mistral(tmp_path_factory.mktemp("dense"))
    with serving(str(folder), "--dense-layers", "router", "--device", "cpu") as serve:
        serve.wait_ready()
        yield serve
        serve.popen.send_signal(signal.SIGTERM)
        assert serve.end() == 0
        serve.assert_nothing_is_left()


def ask(*command: str) -> dict[str, Any]:
    """What a verb prints as JSON."""
    done = subprocess.run(
        [*MOESAIC, *command, "--json"], capture_output=True, text=True, timeout=240, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_it_answers_and_no_worker_is_started(served: Serve) -> None:
    with SyncClient(served.grpc) as client:
        answer = client.complete(PROMPT, max_tokens=6, temperature=0, ignore_eos=True)
        assert len(answer.token_ids) == 6
        assert client.model_info().epoch
    processes = served.status()["topology"]["processes"]
    assert [process["name"] for process in processes] == ["controller", "gateway", "router-0"]
    assert {process["state"] for process in processes} == {"ready"}


def test_top_shows_the_router_alone(served: Serve) -> None:
    look = ask("top", "--grpc", served.grpc, "--once")
    assert [router["name"] for router in look["routers"]] == ["router-0"]
    assert look["workers"] == []


def test_bench_measures_it_and_counts_no_calls(served: Serve) -> None:
    load = ("--concurrency", "2", "--requests", "4", "--prompt-len", "8", "--output-len", "4")
    report = ask("bench", "--url", f"http://{served.http}", "--grpc", served.grpc, *load)
    (row,) = report["rows"]
    assert row["load"]["failed_requests"] == 0
    assert (row["profile"]["workers"], row["profile"]["calls_per_output_token"]) == ([], 0.0)

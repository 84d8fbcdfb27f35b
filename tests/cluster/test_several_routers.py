"""`moesaic serve --routers 2`: one gateway, two routers, the same workers; either router may die."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.serve_command import Serve, serving, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

RECOVERY_S = 180.0


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Serve]:
    """It must end cleanly on SIGTERM, whatever the tests did to it."""
    with serving(str(tiny), "--workers", "2", "--routers", "2") as serve:
        serve.wait_ready()
        yield serve
        serve.popen.send_signal(signal.SIGTERM)
        assert serve.end() == 0
        serve.assert_nothing_is_left()


def complete(served: Serve, prompt: list[int], max_tokens: int = 12) -> list[int]:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://{served.http}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        token_ids: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
        return token_ids


def load(served: Serve, numbers: Iterable[int]) -> None:
    """Requests with prompts of their own, eight at a time."""
    prompts = [[*divmod(number, 32), 3] for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: complete(served, prompt, max_tokens=32), prompts))


def health(served: Serve) -> int:
    with urllib.request.urlopen(f"http://{served.http}/health", timeout=60) as answer:
        return int(answer.status)


def test_both_routers_serve_behind_one_gateway_and_share_the_load(served: Serve) -> None:
    before = served.status()
    processes = {process["name"]: process for process in before["topology"]["processes"]}
    assert {name for name in processes if name.startswith("router")} == {"router-0", "router-1"}
    assert {process["state"] for process in processes.values()} == {"ready"}
    assert processes["router-0"]["address"] == served.grpc != processes["router-1"]["address"]
    load(served, range(1, 17))
    after = served.status()["routers"]
    grown = {
        name: after[name]["generated_tokens"] - before["routers"][name]["generated_tokens"] for name in after
    }
    assert sum(grown.values()) == 16 * 32
    assert min(grown.values()) >= 4 * 32


@pytest.mark.parametrize("name", ["router-0", "router-1"])
def test_while_one_router_is_dead_the_other_answers_and_it_comes_back(served: Serve, name: str) -> None:
    prompts = [[index + 1, 17, 42, 8] for index in range(6)]
    expected = [complete(served, prompt) for prompt in prompts]
    victim = served.process(name)
    os.kill(victim["pid"], signal.SIGKILL)
    assert [complete(served, prompt) for prompt in prompts] == expected
    assert health(served) == 200

    def is_back() -> bool:
        try:
            after = served.process(name)
        except subprocess.CalledProcessError:  # router-0, whom the status asks, is still away
            return False
        return bool(after["state"] == "ready" and after["restarts"] == victim["restarts"] + 1)

    until(is_back, RECOVERY_S, f"{name} did not come back")

    # The gateway finds it a moment later than the controller, and only then may the other one die.
    unseen = itertools.count(100)

    def is_asked_again() -> bool:
        before = served.status()["routers"][name]["generated_tokens"]
        load(served, itertools.islice(unseen, 16))
        return bool(served.status()["routers"][name]["generated_tokens"] > before)

    until(is_asked_again, RECOVERY_S, f"{name} is not asked again")
    assert [complete(served, prompt) for prompt in prompts] == expected

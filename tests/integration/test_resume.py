"""Routers that are killed or stand still in the middle of answers, before real clients: the answers are those of an
undisturbed run, to the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.processes import Process, running_gateway, running_workers

import cluster
from moesaic import SyncClient, Token

DEMO_MODEL = Path(cluster.__file__).parent / "demo_model"
PROMPT = "ROMEO:"
GREEDY = {"temperature": 0.0, "max_tokens": 200, "n": 1}
SEEDED = {"temperature": 1.0, "seed": 11, "max_tokens": 200, "n": 2}
WAIT_S = 60.0


@dataclass
class Answer:
    """One choice, as far as no two runs may differ in it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: tuple[int, int] = (0, 0)


class Routers:
    """Two routers over the same workers, each of which is started again at its own port after its death."""

    def __init__(self, workers: list[Process]) -> None:
        self._flags = [flag for worker in workers for flag in ("--worker", worker.address)]
        self.processes = [self._start(0), self._start(0)]

    def _start(self, port: int) -> Process:
        router = Process("router", "--model", str(DEMO_MODEL), "--port", str(port), *self._flags)
        router.wait_ready(120)
        return router

    @property
    def addresses(self) -> list[str]:
        return [process.address for process in self.processes]

    def busy(self) -> int:
        """The number of the router that computes something now."""
        ends_s = time.monotonic() + WAIT_S
        while time.monotonic() < ends_s:
            for index, address in enumerate(self.addresses):
                with SyncClient(address, retries=False) as client:
                    if client.router_stats().running_sequences:
                        return index
        raise AssertionError("no router is busy")

    def start_again(self, index: int) -> None:
        port = int(self.addresses[index].rpartition(":")[2])
        self.processes[index].stop()
        self.processes[index] = self._start(port)


@pytest.fixture(scope="module")
def routers() -> Iterator[Routers]:
    with running_workers(DEMO_MODEL, ["all"]) as workers:
        both = Routers(workers)
        yield both
        for process in both.processes:
            process.stop()


@pytest.fixture(scope="module")
def gateway(routers: Routers) -> Iterator[str]:
    first, second = routers.processes
    with running_gateway(first, "--router", second.address) as process:
        until_serving(process)
        yield process.address


def until_serving(gateway: Process) -> None:
    with httpx.Client(base_url=f"http://{gateway.address}", timeout=10.0) as http:
        ends_s = time.monotonic() + WAIT_S
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < ends_s, gateway.log
            time.sleep(0.05)


Ask = Callable[[dict[str, Any], Callable[[], None]], list[Answer]]


def over_http(address: str) -> Ask:
    def ask(options: dict[str, Any], on_middle: Callable[[], None]) -> list[Answer]:
        api = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
        answers = [Answer() for _ in range(options["n"])]
        num_tokens = 0
        stream = api.completions.create(
            model="demo_model",
            prompt=PROMPT,
            stream=True,
            logprobs=0,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
            **options,
        )
        for chunk in stream:
            if chunk.usage is not None:
                answers[0].usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            for choice in chunk.choices:
                answer = answers[choice.index]
                answer.text += choice.text
                answer.token_ids += choice.model_extra["token_ids"]
                answer.logprobs += choice.logprobs.token_logprobs
                answer.finish_reason = choice.finish_reason or answer.finish_reason
                num_tokens += len(choice.model_extra["token_ids"])
                if num_tokens == 10:
                    on_middle()
        return answers

    return ask


def over_grpc(addresses: list[str]) -> Ask:
    def ask(options: dict[str, Any], on_middle: Callable[[], None]) -> list[Answer]:
        answers = [Answer() for _ in range(options["n"])]
        with SyncClient(addresses, timeout_s=WAIT_S) as client:
            for number, token in enumerate(client.generate(PROMPT, logprobs=0, **options)):
                take(answers[token.index], token)
                if number == 10:
                    on_middle()
        return answers

    return ask


def take(answer: Answer, token: Token) -> None:
    answer.text += token.text
    answer.token_ids += token.token_ids
    answer.logprobs += [entry.logprob or 0.0 for entry in token.logprobs]
    answer.finish_reason = token.finish_reason or answer.finish_reason
    if token.usage is not None:
        answer.usage = token.usage.prompt_tokens, token.usage.completion_tokens


def check_equal(answers: list[Answer], undisturbed: list[Answer]) -> None:
    for answer, other in zip(answers, undisturbed, strict=True):
        assert (answer.text, answer.token_ids) == (other.text, other.token_ids)
        assert (answer.finish_reason, answer.usage) == (other.finish_reason, other.usage)
        # The last bits depend on how many rows are computed at once.
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("options", [GREEDY, SEEDED])
@pytest.mark.parametrize("way", ["gateway", "client"])
def test_an_answer_outlives_its_router(
    routers: Routers, gateway: str, way: str, options: dict[str, Any]
) -> None:
    ask = over_http(gateway) if way == "gateway" else over_grpc(routers.addresses)
    undisturbed = ask(options, lambda: None)
    killed: list[int] = []

    def kill() -> None:
        killed.append(routers.busy())
        routers.processes[killed[0]].kill()

    answers = ask(options, kill)
    routers.start_again(killed[0])
    check_equal(answers, undisturbed)


@pytest.mark.parametrize("way", ["gateway", "client"])
def test_an_answer_waits_for_its_only_router(routers: Routers, way: str) -> None:
    only = routers.processes[0]
    with running_gateway(only) as gateway, ThreadPoolExecutor() as pool:
        until_serving(gateway)
        ask = over_http(gateway.address) if way == "gateway" else over_grpc([only.address])
        undisturbed = ask(SEEDED, lambda: None)

        def restart() -> None:
            only.kill()
            starting.append(pool.submit(routers.start_again, 0))

        starting: list[Any] = []
        check_equal(ask(SEEDED, restart), undisturbed)
        starting[0].result()


@pytest.mark.parametrize("way", ["gateway", "client"])
def test_a_router_that_stands_still_is_left_within_seconds(routers: Routers, gateway: str, way: str) -> None:
    ask = over_http(gateway) if way == "gateway" else over_grpc(routers.addresses)
    undisturbed = ask(GREEDY, lambda: None)
    still: list[Process] = []

    def stop() -> None:
        still.append(routers.processes[routers.busy()])
        still[0].stand_still()

    started_s = time.monotonic()
    try:
        answers = ask(GREEDY, stop)
    finally:
        still[0].go_on()
    print(f"{way}: {time.monotonic() - started_s:.1f} s with a router that stands still")
    check_equal(answers, undisturbed)

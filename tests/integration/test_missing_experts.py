"""Real processes: both replicas of some experts are killed in mid-answer, and come back later or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from support.checkpoints import write_mixtral
from support.processes import Process, running_gateway, running_router, running_workers

from moesaic import Client, Deny, ExpertPolicy, rpc
from moesaic.client.completion import Token
from moesaic.errors import DeadlineExceeded, MoesaicError
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1 import inference_pb2_grpc

WAIT_S = 60.0
PROMPT = [7, 8, 9, 10, 11]
NUM_NEW = 200
# Of the slots 0 to 3 this one has two replicas, which die together; the others are on a worker of their own.
DYING = (0,)
ALIVE = Deny(*(f"{layer}:{slot}" for layer in range(2) for slot in DYING))
SHARES = ["0", "0", "1-3"]


class Site:
    def __init__(self, model: Path, workers: list[Process], router: Process) -> None:
        self.model = model
        self.workers = workers
        self.router = router
        self.address = router.address
        self.restarted: list[Process] = []

    def kill(self) -> None:
        for worker in self.workers[:2]:
            worker.kill()

    def restart(self) -> None:
        """At the same address, as whoever looks after processes does it."""
        port = self.workers[0].address.rpartition(":")[2]
        flags = ("--experts", SHARES[0], "--name", "worker-0", "--port", port, "--threads", "1")
        worker = Process("expert_worker", "--model", str(self.model), *flags)
        self.restarted.append(worker)
        worker.wait_ready()


@contextmanager
def serving(model: Path, *router: str) -> Iterator[Site]:
    with running_workers(model, SHARES) as workers, running_router(model, workers, *router) as process:
        site = Site(model, workers, process)
        try:
            yield site
        finally:
            for worker in site.restarted:
                worker.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


async def rest(stream: AsyncIterator[Token]) -> list[int]:
    return [token_id async for token in stream for token_id in token.token_ids]


async def parked(client: Client, number: int) -> None:
    """Returns when so many sequences wait for an expert."""
    async with asyncio.timeout(WAIT_S):
        while (await client.router_stats()).parked_sequences != number:
            await asyncio.sleep(0.02)


async def test_streams_go_on_with_the_same_text_when_an_expert_is_back(model: Path) -> None:
    with serving(model) as site:
        async with Client(site.address) as client:
            options = {"max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True, "timeout_s": WAIT_S}
            expected = (await client.complete(PROMPT, **options)).token_ids
            alone = (await client.complete(PROMPT, experts=ALIVE, **options)).token_ids
            stream = client.generate(PROMPT, **options)
            begun = [token_id for _ in range(3) for token_id in (await anext(stream)).token_ids]
            await asyncio.to_thread(site.kill)
            reading = asyncio.create_task(rest(stream))
            await parked(client, 1)
            # Whose experts are alive runs on, and a new request is let in.
            assert (await client.complete(PROMPT, experts=ALIVE, **options)).token_ids == alone
            late = asyncio.create_task(client.complete(PROMPT, **options))
            await parked(client, 2)
            await asyncio.sleep(3)
            await asyncio.to_thread(site.restart)
            assert (*begun, *(await reading)) == expected
            assert (await late).token_ids == expected
            assert (await client.router_stats()).parked_sequences == 0


async def test_a_deadline_that_passes_in_a_wait_says_what_was_missing(model: Path) -> None:
    with serving(model) as site:
        async with Client(site.address) as client:
            stream = client.generate(PROMPT, max_tokens=NUM_NEW, temperature=0, ignore_eos=True, timeout_s=5)
            for _ in range(3):
                await anext(stream)
            await asyncio.to_thread(site.kill)
            with pytest.raises(DeadlineExceeded, match=r"deadline passed after \d+ tokens: layer \d+"):
                await rest(stream)
        async with Client(site.address, retries=False) as client:
            with pytest.raises(MoesaicError, match="no replica left") as caught:
                await client.complete(PROMPT, max_tokens=8, experts=ExpertPolicy(on_missing="fail"))
            assert caught.value.reason == "NO_REPLICA"


@pytest.mark.parametrize("on_missing", ["substitute", "renormalise"])
async def test_an_answer_without_an_expert_is_labelled_everywhere(model: Path, on_missing: str) -> None:
    with serving(model, "--on-missing", on_missing) as site:
        async with Client(site.address) as client:
            options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "timeout_s": WAIT_S}
            full = await client.complete(PROMPT, **options)
            assert full.degraded is None
            # Denying the others says which tokens a model without them has: a full answer of another kind.
            without = await client.complete(PROMPT, experts=ALIVE, **options)
            stream = client.generate(PROMPT, **(options | {"max_tokens": NUM_NEW}))
            await anext(stream)
            await asyncio.to_thread(site.kill)
            assert len(await rest(stream)) == NUM_NEW - 1
            answer = await client.complete(PROMPT, **options)
            assert answer.degraded is not None and answer.degraded.policy == on_missing
            if on_missing == "substitute":
                assert answer.token_ids == without.token_ids
            assert (await client.router_stats()).degraded_assignments >= answer.degraded.assignments
        async with rpc.aio_channel(site.address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=PROMPT),
                    sampling=pb.SamplingParams(max_tokens=24, temperature=0),
                ),
                timeout=WAIT_S,
            )
            last = [response async for response in call][-1]
            trailers = dict((await call.trailing_metadata()) or ())
            assert await call.code() == grpc.StatusCode.OK
        label = f"{on_missing}; assignments={last.degraded.assignments}"
        assert trailers[rpc.DEGRADED_TRAILER] == label
        with running_gateway(site.router) as gateway:
            body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
            async with httpx.AsyncClient(base_url=f"http://{gateway.address}", timeout=WAIT_S) as http:
                reply = await http.post("/v1/completions", json=body)
            word = {"policy": on_missing, "assignments": last.degraded.assignments}
            assert reply.headers["x-moesaic-degraded"] == label
            assert reply.json()["moesaic"]["degraded"] == word

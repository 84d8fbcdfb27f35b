"""The whole path with real processes: HTTP or gRPC client, gateway, router, two expert workers, the built-in model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.processes import Process, running_gateway, running_router, running_workers

import cluster
from moesaic import Client, Deny, SyncClient, rpc
from moesaic.client.completion import WeightVersion
from moesaic.errors import InvalidArgument, MoesaicError, NotFound, Unavailable

DEMO_MODEL = Path(cluster.__file__).parent / "demo_model"
MARKER = "Zanzibarquux"  # in prompts, and therefore never in a log


@dataclass(frozen=True, slots=True)
class Deployment:
    workers: list[Process]
    router: Process
    gateway: Process

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with (
        running_workers(DEMO_MODEL, ["0-2", "3-7"]) as workers,
        running_router(DEMO_MODEL, workers) as router,
        running_gateway(router) as gateway,
    ):
        with httpx.Client(base_url=f"http://{gateway.address}", timeout=60) as http:
            deadline = time.monotonic() + 60.0
            while http.get("/ready").status_code != 200:
                assert time.monotonic() < deadline, gateway.log
                time.sleep(0.05)
        yield Deployment(workers, router, gateway)


@pytest.fixture
def api(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
async def client(deployment: Deployment) -> AsyncIterator[Client]:
    async with Client(deployment.router.address) as made:
        yield made


def test_openai_completions_stream_the_very_text_of_the_whole_answer(api: openai.OpenAI) -> None:
    request = {"model": "demo_model", "prompt": "ROMEO:", "max_tokens": 24, "temperature": 0}
    whole = api.completions.create(**request)
    chunks = list(api.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text != ""
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None and whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"


def test_openai_chat_answers_and_streams(api: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Speak of the king."}]
    request = {"model": "demo_model", "messages": messages, "max_tokens": 16, "temperature": 0}
    whole = api.chat.completions.create(**request)
    chunks = api.chat.completions.create(**request, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content != ""


def test_seeded_sampling_repeats_itself_and_n_continuations_differ(api: openai.OpenAI) -> None:
    request = {"model": "demo_model", "prompt": "My lord,", "max_tokens": 12, "seed": 5, "n": 3}
    first, second = (api.completions.create(**request) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3


def test_a_scoring_client_gets_exact_log_probabilities_of_its_prompt(api: openai.OpenAI) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    prompt = [5, 90, 300, 7, 1200, 44, 3000]
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)

    answer = api.completions.create(
        model="demo_model", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(prompt) + 1
    assert logprobs.token_logprobs[0] is None
    for place in range(1, len(prompt)):
        assert logprobs.token_logprobs[place] == pytest.approx(
            expected[place - 1, prompt[place]].item(), abs=1e-4
        )
        assert max(logprobs.top_logprobs[place].values()) == pytest.approx(
            expected[place - 1].max().item(), abs=1e-4
        )


async def test_the_client_streams_what_it_completes(client: Client) -> None:
    streamed = [token async for token in client.generate("Once upon a time", max_tokens=16, temperature=0)]
    completed = await client.complete("Once upon a time", max_tokens=16, temperature=0)
    assert "".join(map(str, streamed)) == completed.text != ""
    assert streamed[-1].epoch == completed.epoch == (await client.model_info()).epoch != ""


def test_the_blocking_client_is_the_same_client(deployment: Deployment) -> None:
    with SyncClient(deployment.router.address) as client:
        pieces = [str(token) for token in client.generate("ROMEO:", max_tokens=8, temperature=0)]
        assert "".join(pieces) == client.complete("ROMEO:", max_tokens=8, temperature=0).text


async def test_fifty_streams_at_once_get_the_text_that_each_gets_alone(client: Client) -> None:
    prompts = [f"Act {index}. Enter {'the king and ' * (index % 9)}CLOWN:" for index in range(50)]
    lengths = [4 + 3 * (index % 11) for index in range(50)]
    alone = [
        (await client.complete(prompt, max_tokens=length, temperature=0)).token_ids
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    together = await asyncio.gather(
        *(
            client.complete(prompt, max_tokens=length, temperature=0)
            for prompt, length in zip(prompts, lengths, strict=True)
        )
    )
    assert [answer.token_ids for answer in together] == alone


async def test_a_stream_that_is_left_early_frees_everything(client: Client) -> None:
    async for _ in client.generate("Once", max_tokens=1500, ignore_eos=True):
        break
    deadline = time.monotonic() + 60.0
    while (stats := await client.router_stats()).running_sequences or stats.kv_blocks_used:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_deadline_ends_a_request_and_nothing_else(client: Client) -> None:
    with pytest.raises(MoesaicError) as late:
        await client.complete("Once", max_tokens=1500, ignore_eos=True, timeout_s=0.3)
    assert late.value.code.name == "DEADLINE_EXCEEDED"
    assert (await client.complete("Once", max_tokens=2)).token_ids


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
        ({"prompt": "a", "max_tokens": 5000}, None),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "warm"}, "temperature"),
        ({"prompt": "a", "top_p": -0.1}, "top_p"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "surprise": 1}, "surprise"),
        ({}, "prompt"),
    ],
)
def test_bad_input_names_its_field_and_harms_nobody(
    deployment: Deployment, body: dict[str, object], param: str | None
) -> None:
    with httpx.Client(base_url=deployment.url, timeout=60) as http:
        answer = http.post("/v1/completions", json={"model": "demo_model", **body})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if param is not None:
            assert error["param"].partition("[")[0] == param, error
        assert http.get("/health").status_code == 200


def test_a_context_overflow_is_said_in_the_words_that_clients_look_for(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model="demo_model", prompt="word " * 3000)
    assert "this model's maximum context length is 2048 tokens" in refused.value.message
    assert refused.value.code == "context_length_exceeded"


def test_an_unknown_model_and_an_oversized_body_are_refused(deployment: Deployment) -> None:
    with httpx.Client(base_url=deployment.url, timeout=60) as http:
        assert http.post("/v1/completions", json={"model": "other", "prompt": "a"}).status_code == 404
        big = json.dumps({"model": "demo_model", "prompt": "a" * (9 << 20)})
        headers = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=big, headers=headers).status_code == 413
        assert http.get("/health").status_code == 200


async def test_grpc_clients_get_typed_errors_with_the_field(client: Client) -> None:
    with pytest.raises(InvalidArgument) as bad:
        await client.complete("a", temperature=-1.0)
    assert bad.value.field == "temperature"
    with pytest.raises(NotFound):
        await client.complete("a", model="another")


async def test_what_is_denied_is_never_computed_and_leaves_nothing_to_others(client: Client) -> None:
    async def rows() -> dict[str, int]:
        return {worker.worker: worker.rows for worker in (await client.router_stats()).workers}

    prompt, wanted = "Is this a dagger which I see before me, ", {"max_tokens": 12, "temperature": 0}
    num_layers = (await client.model_info()).num_layers
    whole = await client.complete(prompt, **wanted)
    before = await rows()
    policy = Deny(*(f"{layer}:{slot}" for layer in range(num_layers) for slot in range(3)))
    denied = await client.complete(prompt, experts=policy, return_weight_versions=True, **wanted)
    grown = {worker: num - before[worker] for worker, num in (await rows()).items()}
    assert [num > 0 for _, num in sorted(grown.items())] == [False, True]
    assert denied.experts == policy and denied.epoch == whole.epoch
    assert denied.weight_versions == (WeightVersion(whole.epoch, 0, len(denied.token_ids)),)
    assert denied.token_ids != whole.token_ids and denied.usage.cached_prompt_tokens == 0
    assert (await client.complete(prompt, **wanted)).token_ids == whole.token_ids
    assert (await client.complete(prompt, experts=policy, **wanted)).token_ids == denied.token_ids


@pytest.mark.parametrize(
    ("experts", "field"),
    [
        ({"deny": [f"0:{slot}" for slot in range(8)]}, "experts.deny"),
        ({"deny": ["0:0", "0:"]}, "experts.deny[1]"),
        ({"allow": ["nobody"]}, "experts.allow[0]"),
        ({"require": ["nobody"]}, "experts.require"),
        ({"top_k": 9}, "experts.top_k"),
    ],
)
def test_experts_that_cannot_be_had_are_refused_with_the_place(
    deployment: Deployment, experts: dict[str, object], field: str
) -> None:
    answer = httpx.post(
        f"{deployment.url}/v1/completions", json={"prompt": "a", "experts": experts}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_logs_never_hold_a_prompt(deployment: Deployment, api: openai.OpenAI) -> None:
    api.completions.create(model="demo_model", prompt=f"{MARKER} said", max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model="demo_model", prompt=f"{MARKER} " * 3000)
    for process in (*deployment.workers, deployment.router, deployment.gateway):
        assert MARKER not in process.log


async def test_a_replica_takes_over_from_a_killed_worker_and_no_token_differs() -> None:
    with (
        running_workers(DEMO_MODEL, ["all", "all"]) as workers,
        running_router(DEMO_MODEL, workers) as router,
    ):
        async with Client(router.address) as client:
            expected = (await client.complete("Now is the winter", max_tokens=120, temperature=0)).token_ids
            tokens: list[int] = []
            async for token in client.generate("Now is the winter", max_tokens=120, temperature=0):
                tokens += token.token_ids
                if len(tokens) == 20:
                    workers[0].kill()
            assert tokens == list(expected)


async def test_without_a_replica_a_lost_worker_is_a_clear_error_and_its_return_is_noticed() -> None:
    with (
        running_workers(DEMO_MODEL, ["0-3", "4-7"]) as workers,
        running_router(DEMO_MODEL, workers, "--on-missing", "fail") as router,
    ):
        async with Client(router.address, retries=False) as client:
            workers[1].kill()
            with pytest.raises(Unavailable) as lost:
                await client.complete("Now is the winter", max_tokens=50, temperature=0)
            assert "layer" in lost.value.message and "127.0.0.1" not in lost.value.message
            await health_becomes(router, health_pb2.HealthCheckResponse.NOT_SERVING)
            port = workers[1].address.rpartition(":")[2]
            back = Process(
                "expert_worker",
                "--model",
                str(DEMO_MODEL),
                "--experts",
                "4-7",
                "--port",
                port,
                "--name",
                "worker-1",
            )
            try:
                back.wait_ready()
                deadline = time.monotonic() + 60.0
                while True:
                    try:
                        answer = await client.complete("Now is the winter", max_tokens=5, temperature=0)
                        break
                    except Unavailable:
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.1)
                assert len(answer.token_ids) == 5
                await health_becomes(router, health_pb2.HealthCheckResponse.SERVING)
            finally:
                back.stop()


async def health_becomes(router: Process, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
    """Returns when the router's health says so; fails the test when it does not in time."""
    async with rpc.aio_channel(router.address) as channel, asyncio.timeout(60):
        async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if answer.status == status:
                return

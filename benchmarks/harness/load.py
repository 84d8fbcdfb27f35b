"""Load on a router through its gRPC API: what is sent, and when each token came.

Decode figures exclude the prompt on purpose: the clock runs only while every stream of the batch is decoding,
and stops before the first one ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from cluster.bench.latency import RequestRecord, decode_rate
from cluster.bench.load import closed_loop
from cluster.bench.workload import Lengths, LoadRequest, Workload
from harness.phases import Phases, phases_between
from moesaic import Client
from moesaic.client.router_stats import RouterStats

Prompt = tuple[int, ...]
IDLE_TIMEOUT_S = 60.0


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Prompts of random token ids; those of another seed have no prefix in common with them."""
    requests = random_requests(count, (length, length), (1, 1), vocabulary, seed)
    return [request.prompt for request in requests]


def random_requests(
    count: int, prompt: tuple[int, int], answer: tuple[int, int], vocabulary: int, seed: int
) -> list[LoadRequest]:
    """Requests whose lengths lie between two numbers of tokens, both included."""
    workload = Workload(Lengths(*prompt), Lengths(*answer), shared_prefix=0, seed=seed)
    return workload.requests(count, vocabulary, batch="benchmark")


@dataclass(slots=True)
class Stream:
    """One answer while it arrives; times are readings of `time.perf_counter`."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A spell of decoding with all streams running."""

    tokens_per_s: float
    token_ids: tuple[tuple[int, ...], ...]
    phases: Phases


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds from a request to its first token, as the client saw it, and the router's account of it."""

    seconds: float
    phases: Phases


def decode(router: str, prompts: Sequence[Prompt], steps: int) -> Decoded:
    """Tokens per second of `len(prompts)` streams over `steps` steps, prompts excluded."""
    return asyncio.run(_decode(router, prompts, steps))


def first_token(router: str, prompt: Prompt) -> FirstToken:
    """Reads one prompt and writes one token."""

    async def ask() -> FirstToken:
        async with Client(router, retries=False) as client:
            before = await client.router_stats()  # This call also opens the connection.
            record = await send(client, LoadRequest(prompt, 1), time.perf_counter())
            phases = phases_between(before, await client.router_stats())
            return FirstToken(record.token_times_s[0] - record.due_s, phases)

    return asyncio.run(ask())


def run_load(router: str, requests: Sequence[LoadRequest], open_streams: int) -> list[RequestRecord]:
    """Serves all requests with at most `open_streams` at a time."""

    async def serve_all() -> list[RequestRecord]:
        async with Client(router, retries=False) as client:
            await client.model_info()
            return await closed_loop(partial(send, client), requests, open_streams)

    return asyncio.run(serve_all())


def score(router: str, prompts: Sequence[Prompt]) -> list[float]:
    """The log probability of every prompt token but the first, prompt after prompt."""

    async def ask() -> list[float]:
        async with Client(router, retries=False) as client:
            values: list[float] = []
            for prompt in prompts:
                completion = await client.complete(prompt, max_tokens=1, temperature=0.0, prompt_logprobs=0)
                values += [e.logprob for e in completion.prompt.logprobs if e.logprob is not None]
            return values

    return asyncio.run(ask())


def settle(router: str) -> RouterStats:
    """Waits until no sequence is left on the router, and returns its counters."""

    async def wait() -> RouterStats:
        async with Client(router, retries=False) as client:
            return await until_idle(client)

    return asyncio.run(wait())


async def send(
    client: Client,
    request: LoadRequest,
    due_s: float,
    stream: Stream | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> RequestRecord:
    """One greedy answer of exactly `output_tokens`; fills `stream` as it comes."""
    stream = stream or Stream()
    async for token in client.generate(
        request.prompt, max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True
    ):
        stream.token_times_s += [time.perf_counter()] * len(token.token_ids)
        stream.token_ids += token.token_ids
        if token.token_ids:
            on_token()
    return RequestRecord(
        due_s=due_s,
        end_s=time.perf_counter(),
        prompt_tokens=len(request.prompt),
        token_times_s=tuple(stream.token_times_s),
        token_ids=tuple(stream.token_ids),
    )


async def until_idle(client: Client) -> RouterStats:
    """Waits, because a cancelled stream takes a step to leave the engine."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        stats = await client.router_stats()
        if not stats.running_sequences and not stats.waiting_sequences:
            return stats
        if time.monotonic() > deadline_s:
            raise SystemExit("sequences are left on the router after every client has gone")
        await asyncio.sleep(0.02)


class Streams:
    """Answers that are written at the same time."""

    def __init__(self, client: Client, prompts: Sequence[Prompt], max_tokens: int) -> None:
        self.all = [Stream() for _ in prompts]
        self._moved = asyncio.Event()
        self._tasks = [
            asyncio.create_task(
                send(client, LoadRequest(prompt, max_tokens), time.perf_counter(), stream, self._moved.set)
            )
            for prompt, stream in zip(prompts, self.all, strict=True)
        ]

    async def write(self, number: int) -> None:
        """Waits until each has written `number` more tokens. A stream that fails or ends early raises."""
        wanted = [len(stream.token_ids) + number for stream in self.all]
        while any(len(each.token_ids) < length for each, length in zip(self.all, wanted, strict=True)):
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise SystemExit("a stream ended before enough of it was seen")
            self._moved.clear()
            waiting = asyncio.create_task(self._moved.wait())
            await asyncio.wait({waiting, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def streaming(client: Client, prompts: Sequence[Prompt], max_tokens: int) -> AsyncIterator[Streams]:
    """One stream for each prompt; all are cancelled at the end, and have left the router then."""
    streams = Streams(client, prompts, max_tokens)
    try:
        yield streams
    finally:
        await streams.cancel()
    await until_idle(client)


async def _decode(router: str, prompts: Sequence[Prompt], steps: int) -> Decoded:
    async with Client(router, retries=False) as client:
        # The answers are longer than needed, and are cancelled once enough of them was seen.
        longest = (await client.model_info()).max_model_len - len(prompts[0])
        async with streaming(client, prompts, min(longest, 1024)) as streams:
            await streams.write(1)
            before = await client.router_stats()
            start_s = time.perf_counter()
            await streams.write(steps + 1)
            end_s = time.perf_counter()
            after = await client.router_stats()
    rate = decode_rate([stream.token_times_s for stream in streams.all], start_s, end_s)
    assert rate is not None
    token_ids = tuple(tuple(stream.token_ids) for stream in streams.all)
    return Decoded(rate, token_ids, phases_between(before, after))


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]

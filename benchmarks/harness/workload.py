"""What is asked of a router, through its real gRPC API, and when each token came.

Decode figures exclude the prompt on purpose: the clock runs only while every stream of the batch is decoding, and stops
before the first one ends.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moesaic import Client
from moesaic.v1 import inference_pb2

Prompt = tuple[int, ...]
IDLE_TIMEOUT_S = 60.0
# What the router waits for at a layer, beyond the time its worker computes: see `Phases.overhead_s`.
_OVERHEAD = ("wire", "worker decode", "worker queue", "worker encode")
_WAITING = (*_OVERHEAD, "worker compute")


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Prompts of random token ids; another seed shares no prefix with them."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(vocabulary) for _ in range(length)) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Request:
    prompt: Prompt
    max_tokens: int


@dataclass(slots=True)
class Stream:
    """One answer as a client saw it: seconds on the monotonic clock."""

    sent_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s


@dataclass(frozen=True, slots=True)
class Phases:
    """Where the router's time went between two moments: seconds of each phase, and how many steps they cover."""

    seconds: Mapping[str, float]
    steps: int
    sent_bytes: int
    received_bytes: int
    calls: int
    tokens: int

    def per_step_s(self, *names: str) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names) / max(1, self.steps)

    @property
    def step_s(self) -> float:
        return self.per_step_s(*self.seconds)

    @property
    def overhead_s(self) -> float:
        """A step's waiting that is not computing: wait at the layers minus the slowest worker's compute time."""
        return self.per_step_s(*_OVERHEAD)

    @property
    def compute_s(self) -> float:
        return self.per_step_s("worker compute")

    @property
    def router_s(self) -> float:
        """A step's time in which the router does not wait for a worker."""
        return self.per_step_s(*(name for name in self.seconds if name not in _WAITING))

    @property
    def bytes_per_token(self) -> float:
        return (self.sent_bytes + self.received_bytes) / max(1, self.tokens)


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


@dataclass(frozen=True, slots=True)
class Load:
    """Requests served, how fast, and each answer."""

    seconds: float
    streams: tuple[Stream, ...]

    @property
    def tokens(self) -> int:
        return sum(len(stream.token_ids) for stream in self.streams)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def decode(router: str, prompts: Sequence[Prompt], steps: int) -> Decoded:
    """Tokens per second of `len(prompts)` streams over `steps` steps, prompts excluded."""
    return asyncio.run(_decode(router, prompts, steps))


def first_token(router: str, prompt: Prompt) -> FirstToken:
    """Reads one prompt and writes one token."""

    async def ask() -> FirstToken:
        async with Client(router) as client:
            before = await client.router_stats()  # the connection is there from now on
            stream = await answer(client, Request(prompt, 1))
            return FirstToken(stream.first_token_s, phases_between(before, await client.router_stats()))

    return asyncio.run(ask())


def run_load(router: str, requests: Sequence[Request], open_streams: int) -> Load:
    """Serves all requests with at most `open_streams` at a time."""

    async def serve_all() -> Load:
        async with Client(router) as client:
            await client.model_info()
            gate = asyncio.Semaphore(open_streams)

            async def one(request: Request) -> Stream:
                async with gate:
                    return await answer(client, request)

            started_s = time.perf_counter()
            streams = await asyncio.gather(*map(one, requests))
            return Load(time.perf_counter() - started_s, tuple(streams))

    return asyncio.run(serve_all())


def score(router: str, prompts: Sequence[Prompt]) -> list[float]:
    """The log probability of every prompt token but the first, prompt after prompt."""

    async def ask() -> list[float]:
        async with Client(router) as client:
            values: list[float] = []
            for prompt in prompts:
                completion = await client.complete(prompt, max_tokens=1, temperature=0.0, prompt_logprobs=0)
                values += [e.logprob for e in completion.prompt.logprobs if e.logprob is not None]
            return values

    return asyncio.run(ask())


def settle(router: str) -> inference_pb2.GetRouterStatsResponse:
    """Waits until no sequence is left on the router, and returns its counters."""

    async def wait() -> inference_pb2.GetRouterStatsResponse:
        async with Client(router) as client:
            return await until_idle(client)

    return asyncio.run(wait())


async def answer(
    client: Client,
    request: Request,
    stream: Stream | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> Stream:
    """One greedy answer of exactly `max_tokens`; fills `stream` as it comes."""
    stream = stream or Stream()
    stream.sent_s = time.perf_counter()
    async for token in client.generate(
        request.prompt, max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True
    ):
        now_s = time.perf_counter()
        for token_id in token.token_ids:
            stream.token_ids.append(token_id)
            stream.arrivals_s.append(now_s)
        if token.token_ids:
            on_token()
    stream.ended_s = time.perf_counter()
    return stream


async def until_idle(client: Client) -> inference_pb2.GetRouterStatsResponse:
    """A cancelled stream takes a step to leave the engine."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        stats = await client.router_stats()
        if not stats.running_sequences and not stats.waiting_sequences:
            return stats
        if time.monotonic() > deadline_s:
            raise SystemExit("sequences are left on the router though nobody waits for them")
        await asyncio.sleep(0.02)


def phases_between(
    before: inference_pb2.GetRouterStatsResponse, after: inference_pb2.GetRouterStatsResponse
) -> Phases:
    earlier = {phase.phase: phase.seconds for phase in before.phases}
    traffic = [
        (new.sent_bytes - old.sent_bytes, new.received_bytes - old.received_bytes, new.calls - old.calls)
        for old, new in zip(before.workers, after.workers, strict=True)
    ]
    return Phases(
        {phase.phase: phase.seconds - earlier[phase.phase] for phase in after.phases},
        steps=after.steps - before.steps,
        sent_bytes=sum(sent for sent, _, _ in traffic),
        received_bytes=sum(received for _, received, _ in traffic),
        calls=sum(calls for _, _, calls in traffic),
        tokens=after.generated_tokens - before.generated_tokens,
    )


async def _decode(router: str, prompts: Sequence[Prompt], steps: int) -> Decoded:
    streams = [Stream() for _ in prompts]
    async with Client(router) as client:
        # One that never ends by itself: it is left when enough was seen.
        longest = (await client.model_info()).max_model_len - len(prompts[0])
        moved = asyncio.Event()
        tasks = [
            asyncio.create_task(answer(client, Request(prompt, min(longest, 1024)), stream, moved.set))
            for prompt, stream in zip(prompts, streams, strict=True)
        ]
        try:
            await _until(lambda: all(stream.arrivals_s for stream in streams), moved, tasks)
            before = await client.router_stats()
            start_s = time.perf_counter()
            begun = [len(stream.arrivals_s) for stream in streams]
            await _until(
                lambda: all(
                    len(stream.arrivals_s) > first + steps
                    for first, stream in zip(begun, streams, strict=True)
                ),
                moved,
                tasks,
            )
            end_s = time.perf_counter()
            after = await client.router_stats()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await until_idle(client)
    return Decoded(
        sum(rate_between(stream.arrivals_s, start_s, end_s) for stream in streams),
        tuple(tuple(stream.token_ids) for stream in streams),
        phases_between(before, after),
    )


async def _until(
    done: Callable[[], bool], moved: asyncio.Event, tasks: Sequence[asyncio.Task[Stream]]
) -> None:
    """Waits for `done`, looking again after every token. A stream that fails or ends early raises."""
    while not done():
        for task in tasks:
            if task.done():
                task.result()
                raise SystemExit("a stream ended before enough of it was seen")
        moved.clear()
        waiting = asyncio.create_task(moved.wait())
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()


def rate_between(arrivals_s: Sequence[float], start_s: float, end_s: float) -> float:
    """Tokens per second from the first to the last arrival within a window: its edges cut no step in two."""
    inside = [arrival for arrival in arrivals_s if start_s <= arrival <= end_s]
    return (len(inside) - 1) / (inside[-1] - inside[0])


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]

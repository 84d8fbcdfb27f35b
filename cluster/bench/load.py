"""The load generator: sends requests to the real API and records when each token arrives.

It runs one task for each stream on one event loop. A token costs it some 60 microseconds, so at a thousand
tokens a second it takes a few hundredths of a core; every report states how much it took.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from cluster.bench.latency import RequestRecord
from cluster.bench.workload import LoadRequest
from moesaic.errors import Unavailable

REQUEST_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
# The first event of an answer repeats the prompt.
MAX_EVENT_BYTES = 4 << 20
# A server's error message is cut at this length.
MAX_ERROR_CHARACTERS = 160
_DATA = b"data: "
_DONE = b"[DONE]"

# Sends one request that is due at a time on the run's clock. A failure of the server is recorded and never
# raised.
Send = Callable[[LoadRequest, float], Awaitable[RequestRecord]]
Clock = Callable[[], float]


class RequestFailed(Exception):
    """A request whose answer is wrong or missing; the message goes to the report.

    `status` and `retry_after_s` are those of an answer that was not begun.
    """

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class AnswerEvent(NamedTuple):
    """One event of a stream: its tokens, and what it says that they were computed by."""

    token_ids: list[int]
    epochs: frozenset[str]


class CompletionsApi:
    """Streamed POST /v1/completions of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, clock: Clock) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._model = model
        self._clock = clock

    async def send(self, request: LoadRequest, due_s: float) -> RequestRecord:
        """Implements `Send`."""
        times_s: list[float] = []
        ids: list[int] = []
        epochs: frozenset[str] = frozenset()
        error, status, retry_after_s = "", 0, None
        try:
            async with self._session.post(self._url, json=self._body(request)) as response:
                await _check_status(response)
                async for event in _events(response.content):
                    times_s += [self._clock()] * len(event.token_ids)
                    ids += event.token_ids
                    epochs |= event.epochs
            if len(ids) != request.output_tokens:
                raise RequestFailed(f"an answer of {len(ids)} tokens for {request.output_tokens}")
        except RequestFailed as failure:
            error, status, retry_after_s = str(failure), failure.status, failure.retry_after_s
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}".strip(": ")
        return RequestRecord(
            due_s=due_s,
            end_s=self._clock(),
            prompt_tokens=len(request.prompt),
            token_times_s=tuple(times_s),
            token_ids=tuple(ids),
            error=error[:MAX_ERROR_CHARACTERS],
            epochs=epochs,
            status=status,
            retry_after_s=retry_after_s,
        )

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "return_weight_versions": True,
        }


@asynccontextmanager
async def completions_api(
    url: str, model: str, clock: Clock = time.perf_counter, *, timeout_s: float = REQUEST_TIMEOUT_S
) -> AsyncIterator[CompletionsApi]:
    """The API at `url` (http://HOST:PORT), with one connection for each stream. A request takes at most `timeout_s`."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=MAX_EVENT_BYTES
    ) as session:
        yield CompletionsApi(session, url, model, clock)


async def ask_model_name(url: str) -> str:
    """The first model that the server at `url` lists. Raises Unavailable."""
    timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url}/v1/models") as answer,
        ):
            await _check_status(answer)
            return str((await answer.json())["data"][0]["id"])
    except RequestFailed as error:
        raise Unavailable(f"url: {error}") from error
    except (aiohttp.ClientError, TimeoutError, OSError, LookupError, TypeError, ValueError) as error:
        raise Unavailable(f"no server of the API answers at {url}: is `moesaic serve` running?") from error


async def closed_loop(
    send: Send, requests: Sequence[LoadRequest], streams: int, clock: Clock = time.perf_counter
) -> list[RequestRecord]:
    """Runs `streams` users, each of whom sends the next request as soon as the last is answered."""
    waiting = iter(requests)
    records: list[RequestRecord] = []

    async def user() -> None:
        for request in waiting:
            records.append(await send(request, clock()))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(streams, len(requests))):
            group.create_task(user())
    return records


async def open_loop(
    send: Send,
    requests: Sequence[LoadRequest],
    arrivals_s: Sequence[float],
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[RequestRecord]:
    """Sends each request at its own time after the start, however many are still being answered."""
    start_s = clock()

    async def user(request: LoadRequest, arrival_s: float) -> RequestRecord:
        await sleep(start_s + arrival_s - clock())
        return await send(request, start_s + arrival_s)

    async with asyncio.TaskGroup() as group:
        users = [
            group.create_task(user(request, arrival_s))
            for request, arrival_s in zip(requests, arrivals_s, strict=True)
        ]
    return [task.result() for task in users]


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        message = json.loads(await response.read())["error"]["message"]
    except (LookupError, TypeError, ValueError):
        message = response.reason
    raise RequestFailed(
        f"HTTP {response.status}: {message}", status=response.status, retry_after_s=_retry_after_s(response)
    )


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """Seconds; None for a header that is missing or that is a date."""
    try:
        return float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[AnswerEvent]:
    """The events of an answer, until [DONE].

    Raises RequestFailed for an error, and when [DONE] is missing.
    """
    async for line in content:
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).rstrip()
        if data == _DONE:
            return
        yield _event(data)
    raise RequestFailed("the stream broke off")


def _event(data: bytes) -> AnswerEvent:
    try:
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(f"in the stream: {event['error']['message']}")
        choice = event["choices"][0]
        versions = (span["version"] for span in choice.get("weight_versions") or ())
        epochs = frozenset(filter(None, (event.get("epoch"), *versions)))
        return AnswerEvent(choice["token_ids"], epochs)
    except (LookupError, TypeError, ValueError) as error:
        raise RequestFailed("an event that is not of this API") from error

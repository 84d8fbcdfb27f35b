"""The load keeps its streams busy, comes back when it is refused, and ends when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.bench.latency import RequestRecord
from cluster.bench.workload import LoadRequest
from cluster.drill.load import PATIENCE_S, Load, ask_alone
from moesaic.errors import Unavailable

REQUESTS = [LoadRequest((number,), 2) for number in range(3)]


class Server:
    """Answers each request with its prompt twice; `spoil` may change a record, by the number of the request."""

    def __init__(self, load_ends_after: int, spoil: Callable[[int, RequestRecord], RequestRecord]) -> None:
        self.now_s = 0.0
        self.sent: list[int] = []
        self.slept_s: list[float] = []
        self.load: Load | None = None
        self._ends_after = load_ends_after
        self._spoil = spoil

    async def send(self, request: LoadRequest, due_s: float) -> RequestRecord:
        await asyncio.sleep(0)
        self.sent.append(request.prompt[0])
        if self.load is not None and len(self.sent) >= self._ends_after:
            self.load.stop()
        record = RequestRecord(due_s, self.now_s, 1, (due_s, due_s), request.prompt * 2)
        return self._spoil(len(self.sent), record)

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


async def loaded(
    streams: int, ends_after: int, spoil: Callable[[int, RequestRecord], RequestRecord]
) -> Server:
    server = Server(ends_after, spoil)
    server.load = Load(server.send, REQUESTS, streams, lambda: server.now_s, server.sleep)
    await server.load.run()
    return server


async def test_every_stream_takes_the_next_prompt_in_turn_until_the_load_ends() -> None:
    server = await loaded(2, 7, lambda number, record: record)
    assert server.sent[:6] == [0, 1, 2, 0, 1, 2]
    assert server.load is not None
    assert len(server.load.answers) == len(server.sent) >= 7
    assert all(answer.record.token_ids == (answer.prompt,) * 2 for answer in server.load.answers)


async def test_a_refused_client_comes_back_when_the_server_said() -> None:
    def refuse_twice(number: int, record: RequestRecord) -> RequestRecord:
        return replace(record, error="HTTP 503", status=503, retry_after_s=2.0) if number <= 2 else record

    server = await loaded(1, 3, refuse_twice)
    assert server.load is not None
    (answer,) = server.load.answers
    assert (answer.refused, answer.record.error, server.slept_s) == (2, "", [2.0, 2.0])


async def test_a_client_that_is_refused_for_too_long_gives_up() -> None:
    def refuse(number: int, record: RequestRecord) -> RequestRecord:
        return replace(record, error="HTTP 503", status=503, retry_after_s=PATIENCE_S / 2)

    server = await loaded(1, 3, refuse)
    assert server.load is not None
    (answer,) = server.load.answers
    assert (answer.refused, answer.record.error) == (2, "HTTP 503")


async def test_a_broken_answer_is_not_asked_for_again() -> None:
    server = await loaded(1, 2, lambda number, record: replace(record, error="broke off"))
    assert server.load is not None
    assert [answer.refused for answer in server.load.answers] == [0, 0]


async def test_a_reference_is_asked_one_at_a_time_and_refused_where_a_healthy_cluster_fails() -> None:
    server = Server(0, lambda number, record: replace(record, epochs=frozenset({"e"})))
    assert await ask_alone(server.send, REQUESTS, lambda: 0.0) == {"e": ((0, 0), (1, 1), (2, 2))}
    failing = Server(0, lambda number, record: replace(record, error="HTTP 500"))
    with pytest.raises(Unavailable, match="HTTP 500"):
        await ask_alone(failing.send, REQUESTS, lambda: 0.0)


async def test_a_reference_has_one_model() -> None:
    server = Server(0, lambda number, record: replace(record, epochs=frozenset({f"e{number % 2}"})))
    with pytest.raises(Unavailable, match="name 2 epochs"):
        await ask_alone(server.send, REQUESTS, lambda: 0.0)

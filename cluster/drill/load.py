"""The load of a drill: as many streams as were asked for, for as long as it lasts, over a few prompts in turn.

Its clients are patient: one that is refused comes back when the server said, as clients of this API do, and gives
up after a while. A client whose answer breaks off does not ask again: that request is lost.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

from cluster.bench.load import Clock, Send
from cluster.bench.workload import LoadRequest
from cluster.drill.answers import Answer
from moesaic.errors import Unavailable

# How long a client asks again.
PATIENCE_S = 30.0
# After an error, so that the clients of a server that is gone do not spin.
AFTER_ERROR_S = 0.25

Sleep = Callable[[float], Awaitable[None]]


async def ask_alone(
    send: Send, requests: Sequence[LoadRequest], clock: Clock
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The tokens of every answer, asked one at a time of a cluster at rest, by the epoch that all of them name.

    Raises Unavailable.
    """
    answers, epochs = [], set[str]()
    for request in requests:
        record = await send(request, clock())
        if record.error:
            raise Unavailable(f"a cluster at rest does not answer: {record.error}")
        answers.append(record.token_ids)
        epochs |= record.epochs
    if len(epochs) != 1:
        raise Unavailable(f"answers of a cluster at rest name {len(epochs)} epochs, where it has one model")
    return {epochs.pop(): tuple(answers)}


class Load:
    """Keeps requests running until it is stopped. `answers`: those that have ended."""

    def __init__(
        self,
        send: Send,
        requests: Sequence[LoadRequest],
        streams: int,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.answers: list[Answer] = []
        self._send = send
        self._requests = requests
        self._streams = streams
        self._clock = clock
        self._sleep = sleep
        self._turns = itertools.cycle(range(len(requests)))
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Returns after `stop`, once every request that was begun has ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._streams):
                group.create_task(self._stream())

    def stop(self) -> None:
        self._stopping.set()

    async def _stream(self) -> None:
        while not self._stopping.is_set():
            answer = await self._ask(next(self._turns))
            self.answers.append(answer)
            if answer.record.error:
                await self._sleep(AFTER_ERROR_S)

    async def _ask(self, prompt: int) -> Answer:
        due_s = self._clock()
        for refused in itertools.count():
            record = await self._send(self._requests[prompt], due_s)
            wait_s = record.retry_after_s
            if wait_s is None or self._clock() + wait_s > due_s + PATIENCE_S:
                return Answer(prompt, record, refused)
            await self._sleep(wait_s)
        raise AssertionError  # the count has no end

"""The second act of `moesaic demo`: the same request again, while a worker that computes it is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.observation.observer import Observer
from cluster.terminal.word_flow import WordFlow
from moesaic import Client
from moesaic.client.generate_request import GenerateOptions
from moesaic.v1 import control_pb2

# Fewer tokens have no middle in which to kill anybody.
MIN_TOKENS = 6
RETURN_TIMEOUT_S = 120.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Drill:
    """What became of an answer whose worker was killed, and of the worker.

    `back_after_s`: from the kill until the worker was ready again; None if that took too long.
    """

    worker: str
    pid: int
    killed_after_tokens: int
    same_text: bool
    longest_pause_s: float
    back_after_s: float | None


class PauseClock:
    """The longest time between two tokens of a stream."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s: float | None = None
        self.longest_s = 0.0

    def token(self) -> None:
        now_s = self._clock()
        if self._last_s is not None:
            self.longest_s = max(self.longest_s, now_s - self._last_s)
        self._last_s = now_s


async def run_drill(
    client: Client,
    observer: Observer,
    victim: control_pb2.Process,
    prompt: str,
    options: GenerateOptions,
    *,
    expected: str,
    kill_after: int,
    flow: WordFlow | None,
) -> Drill:
    """Asks again and kills the victim, a process of this machine, after `kill_after` tokens.

    Raises the MoesaicError of a request that did not survive.
    """
    text, num_tokens, killed_s, pauses = "", 0, None, PauseClock()
    if flow is not None:
        flow.write(f"\n{prompt}")
    async for token in client.generate(prompt, **options):
        if token.token_ids:
            pauses.token()
        num_tokens += len(token.token_ids)
        text += token.text
        if flow is not None:
            flow.write(token.text)
        if killed_s is None and num_tokens >= kill_after:
            os.kill(victim.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            if flow is not None:
                flow.note(f"[bold red]kill -9 {victim.name}[/] [red](process {victim.pid})[/]")
    if flow is not None:
        flow.end()
    assert killed_s is not None
    return Drill(
        worker=victim.name,
        pid=victim.pid,
        killed_after_tokens=kill_after,
        same_text=text == expected,
        longest_pause_s=pauses.longest_s,
        back_after_s=await _return_of(victim, observer, killed_s),
    )


async def _return_of(victim: control_pb2.Process, observer: Observer, killed_s: float) -> float | None:
    """Seconds from the kill until another process of the victim's name is ready."""
    while time.monotonic() - killed_s < RETURN_TIMEOUT_S:
        topology = (await observer.observe_routers()).topology
        for process in () if topology is None else topology.processes:
            is_ready = process.state == control_pb2.PROCESS_STATE_READY
            if process.name == victim.name and process.pid != victim.pid and is_ready:
                return time.monotonic() - killed_s
        await asyncio.sleep(POLL_S)
    return None

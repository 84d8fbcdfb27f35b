"""transformers as a side of a benchmark: the product's own peer, called without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.transformers_peer import PlainBatch, TransformersPeer, program, transformers_peer
from cluster.bench.workload import LoadRequest
from harness.load import Prompt


@dataclass(frozen=True, slots=True)
class Peer:
    """One loaded model in a process of its own."""

    _peer: TransformersPeer
    _runner: asyncio.Runner

    @property
    def pid(self) -> int:
        return self._peer.pid

    def decode(self, prompts: Sequence[Prompt], steps: int) -> PlainBatch:
        """Writes the first token of every prompt, then `steps` more."""
        requests = [LoadRequest(prompt, steps + 1) for prompt in prompts]
        return self._runner.run(self._peer.run(requests))


@contextmanager
def running_peer(command: Sequence[str]) -> Iterator[Peer]:
    with asyncio.Runner() as runner:
        context = transformers_peer(command)
        peer = runner.run(context.__aenter__())
        try:
            yield Peer(peer, runner)
        finally:
            runner.run(context.__aexit__(None, None, None))


def plain_transformers(folder: Path) -> tuple[str, ...]:
    """The command for a folder's model in float32 on the CPU."""
    return program(folder, "float32", "cpu", "float32")

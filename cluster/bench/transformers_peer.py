"""A process of `cluster.bench.transformers_program`, and what it answers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.latency import WaveSummary
from cluster.bench.workload import LoadRequest
from moesaic.errors import Unavailable
from moesaic.settings import Device, DType

PROGRAM = "cluster.bench.transformers_program"
# Long enough for a batch of long prompts on a small machine, with its trials.
ANSWER_TIMEOUT_S = 1800.0
END_TIMEOUT_S = 10.0
# An answer holds every token id of a batch.
MAX_LINE_BYTES = 64 << 20
# Our processes are set to share the cores; the peer has them to itself, and torch's defaults suit it best.
NOT_INHERITED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class PlainBatch:
    """One batch, and the fastest ways for it: an implementation of the experts and a cache each.

    The trials give the seconds of each way to read such prompts, and for one step of decoding.
    """

    summary: WaveSummary
    token_ids: tuple[tuple[int, ...], ...]
    reading: str
    decoding: str
    reading_trials_s: Mapping[str, float]
    decoding_trials_s: Mapping[str, float]

    @property
    def experts(self) -> str:
        """For prompts and for decoding; a dynamic cache goes without saying."""
        return " / ".join(way.removesuffix(", dynamic cache") for way in (self.reading, self.decoding))


class TransformersPeer:
    """One loaded model."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def run(self, requests: Sequence[LoadRequest]) -> PlainBatch:
        """Decodes requests of one length as one batch. Raises Unavailable when the process ends over it."""
        prompts, num_tokens = [request.prompt for request in requests], requests[0].output_tokens
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}).encode() + b"\n")
        answer = await self.answer()
        token_ids = tuple(map(tuple, answer["token_ids"]))
        prefill_s, decode_s = answer["prefill_s"], answer["decode_s"]
        tokens = sum(map(len, token_ids))
        return PlainBatch(
            WaveSummary(
                prefill_s=prefill_s,
                decode_tokens_per_s=(tokens - len(prompts)) / decode_s if tokens > len(prompts) else None,
                output_tokens_per_s=tokens / (prefill_s + decode_s),
            ),
            token_ids,
            answer["reading"],
            answer["decoding"],
            answer["trials"]["reading_s"],
            answer["trials"]["decoding_s"],
        )

    async def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise Unavailable("against: transformers could not run this model: what it said is above")
        values: dict[str, Any] = json.loads(line)
        return values


def program(folder: Path, dtype: DType, device: Device, stored: str) -> tuple[str, ...]:
    """The command that loads the model of a folder.

    `stored` is the type of the weights on disk, on which the dtype `auto` depends.
    """
    return (sys.executable, "-m", PROGRAM, str(folder), dtype, device, stored)


@asynccontextmanager
async def transformers_peer(command: Sequence[str]) -> AsyncIterator[TransformersPeer]:
    """The process of a command such as `program` gives; its model is loaded on entry. Raises Unavailable."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        limit=MAX_LINE_BYTES,
        start_new_session=True,
    )
    try:
        peer = TransformersPeer(process)
        await peer.answer()
        yield peer
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kills the process, which has nothing to lose."""
    if process.returncode is None:
        process.kill()
    await asyncio.wait_for(process.wait(), END_TIMEOUT_S)

"""The process of `cluster.bench.transformers_program`, as the benchmark talks to it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.latency import WaveSummary
from cluster.bench.workload import LoadRequest
from moesaic.errors import Unavailable
from moesaic.settings import Device, DType

PROGRAM = "cluster.bench.transformers_program"
# A batch of long prompts on a small machine, with its trials.
ANSWER_TIMEOUT_S = 1800.0
END_TIMEOUT_S = 10.0
# An answer holds every token id of a batch.
MAX_LINE_BYTES = 64 << 20
# Ours are set for processes that share the cores in turn; the other side has its own best.
NOT_INHERITED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class PlainBatch:
    """One batch of the other side."""

    summary: WaveSummary
    token_ids: tuple[tuple[int, ...], ...]
    # "for prompts / for decoding"
    experts: str


class TransformersSide:
    """One model, loaded."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, requests: Sequence[LoadRequest]) -> PlainBatch:
        """Requests of one length, as one batch. Raises Unavailable when the process ends over it."""
        prompts, num_tokens = [request.prompt for request in requests], requests[0].output_tokens
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}).encode() + b"\n")
        answer = await self.answer()
        decode_s = sum(answer["decode_s"])
        return PlainBatch(
            WaveSummary(
                prefill_s=answer["prefill_s"],
                decode_tokens_per_s=len(prompts) * len(answer["decode_s"]) / decode_s if decode_s else None,
                output_tokens_per_s=len(prompts) * num_tokens / (answer["prefill_s"] + decode_s),
            ),
            tuple(map(tuple, answer["token_ids"])),
            f"{answer['prefill_experts']} / {answer['decode_experts']}",
        )

    async def answer(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise Unavailable("against: transformers could not run this model: what it said is above")
        values: dict[str, Any] = json.loads(line)
        return values


@asynccontextmanager
async def transformers_side(
    folder: Path, dtype: DType, device: Device, stored: str
) -> AsyncIterator[TransformersSide]:
    """The model of a folder in a process of its own, loaded when the context is entered. Raises Unavailable.

    `stored`: the type of the weights on disk, on which `auto` depends.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", PROGRAM, str(folder), dtype, device, stored),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        limit=MAX_LINE_BYTES,
        start_new_session=True,
    )
    try:
        side = TransformersSide(process)
        await side.answer()
        yield side
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """It has nothing to lose."""
    if process.returncode is None:
        process.kill()
    await asyncio.wait_for(process.wait(), END_TIMEOUT_S)

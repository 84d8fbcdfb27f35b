"""Resident memory of every process against its share of the weights.

Real processes serve a checkpoint much larger than one worker's share. Processes of the same kind that serve a
tiny one give the overhead that has nothing to do with weights (interpreter, torch, gRPC).

Run: python benchmarks/memory.py [--workers 4]
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from harness import options
from harness.result import Table, conclude
from harness.serving import Setup, serve
from random_checkpoint import Shape, write_checkpoint

from moesaic import Client, rpc
from moesaic.v1 import expert_pb2, expert_pb2_grpc

MIB = 1 << 20
TINY = Shape(hidden=64, inner=64, layers=1, heads=4, kv_heads=4, vocabulary=64, context=64)


@dataclass(frozen=True, slots=True)
class Row:
    """One process: the bytes of weights that it holds, its resident bytes now, and their peak so far."""

    name: str
    weights: int
    resident: int
    peak: int


def main(
    workers: Annotated[int, typer.Option(min=1, max=8)] = 4,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes memory.json."""
    large = options.checkpoint(model, quick)
    with tempfile.TemporaryDirectory() as folder:
        bare = measure(write_checkpoint(Path(folder, "tiny"), TINY), 1)
    rows = measure(large, workers)
    overhead = {row.name.split("-")[0]: row.resident for row in bare}
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    conclude(
        "memory",
        out,
        figures=[],
        tables=[
            Table(
                "",
                (
                    "process",
                    "weights MiB",
                    "resident MiB",
                    "resident - weights",
                    "bare process MiB",
                    "peak MiB",
                ),
                tuple(_cells(row, overhead[row.name.split("-")[0]]) for row in rows),
            )
        ],
        notes=[
            f"checkpoint {size / MIB:,.0f} MiB (bfloat16), {workers} workers; a request of 256 + 32 tokens was served"
        ],
        quick=quick,
    )


def measure(model: Path, workers: int) -> list[Row]:
    """Serves one request of the model and reads every process's memory."""
    with serve(Setup(model, workers=workers, settings={"dtype": "bfloat16"})) as site:
        held = asyncio.run(exercise(site.router, site.workers))
        dense = sum(file.stat().st_size for file in model.glob("*.safetensors")) - sum(held)
        weights = (*held, dense)
        return [
            Row(name, size, *resident_and_peak(pid))
            for (name, pid), size in zip(site.processes.items(), weights, strict=True)
        ]


async def exercise(router: str, workers: Sequence[str]) -> list[int]:
    """Generates a few tokens, so that every buffer is in use; returns the weight bytes of each worker."""
    async with Client(router, retries=False) as client:
        vocabulary = (await client.model_info()).vocab_size
        await client.complete(
            [index % vocabulary for index in range(32 if vocabulary < 256 else 256)], max_tokens=32
        )
    held = []
    for address in workers:
        async with rpc.aio_channel(address) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            held.append((await stub.Describe(expert_pb2.DescribeRequest(), timeout=5.0)).weight_bytes)
    return held


def resident_and_peak(pid: int) -> tuple[int, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status))
    return int(values["VmRSS"]) << 10, int(values["VmHWM"]) << 10


def _cells(row: Row, bare: int) -> tuple[str, ...]:
    cells = (row.weights, row.resident, row.resident - row.weights, bare, row.peak)
    return (row.name, *(f"{cell / MIB:,.0f}" for cell in cells))


if __name__ == "__main__":
    typer.run(main)

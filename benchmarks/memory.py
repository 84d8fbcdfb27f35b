"""Resident memory of every process against its share of the weights.

A checkpoint much larger than one worker's share is served by real processes; a tiny one by processes of the same kind
gives the overhead that has nothing to do with weights (interpreter, torch, gRPC). Prints the table of
docs/performance.md. Run: python benchmarks/memory.py [--workers 4]
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from random_checkpoint import Shape, write_checkpoint

from moesaic import Client, rpc
from moesaic.v1 import expert_pb2, expert_pb2_grpc

MIB = 1 << 20
TINY = Shape(hidden=64, inner=64, layers=1, heads=4, kv_heads=4, vocabulary=64, context=64)


@dataclass(frozen=True, slots=True)
class Row:
    """One process: bytes of weights it holds, resident bytes now and at most so far."""

    name: str
    weights: int
    resident: int
    peak: int


def main(workers: Annotated[int, typer.Option(min=1, max=8)] = 4) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        bare = measure(write_checkpoint(Path(folder, "tiny"), TINY), 1)
        model = write_checkpoint(Path(folder, "large"), Shape())
        size = sum(file.stat().st_size for file in model.iterdir())
        rows = measure(model, workers)
    overhead = {row.name.split("-")[0]: row.resident for row in bare}
    print(
        f"checkpoint {size / MIB:,.0f} MiB (bfloat16), {workers} workers; a request of 256 + 32 tokens was served"
    )
    print("| process | weights MiB | resident MiB | resident - weights | bare process MiB | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = (
            row.weights,
            row.resident,
            row.resident - row.weights,
            overhead[row.name.split("-")[0]],
            row.peak,
        )
        print(f"| {row.name} | " + " | ".join(f"{cell / MIB:,.0f}" for cell in cells) + " |")


def measure(model: Path, workers: int) -> list[Row]:
    """Serves one request of the model and reads every process's memory."""
    shares = [f"{8 * index // workers}-{8 * (index + 1) // workers - 1}" for index in range(workers)]
    flags = ["--model", str(model), "--dtype", "bfloat16"]
    processes: list[subprocess.Popen[str]] = []
    try:
        processes += [
            start("expert_worker", *flags, "--experts", share, "--name", f"worker-{index}")
            for index, share in enumerate(shares)
        ]
        addresses = [wait_ready(process) for process in processes]
        named = [flag for address in addresses for flag in ("--worker", address)]
        processes.append(start("router", *flags, "--port", "0", *named))
        target = wait_ready(processes[-1])
        held = asyncio.run(exercise(target, addresses))
        dense = sum(file.stat().st_size for file in model.glob("*.safetensors")) - sum(held)
        names = [*(f"worker-{index}" for index in range(workers)), "router-0"]
        return [
            Row(name, weights, *resident_and_peak(process.pid))
            for name, weights, process in zip(names, [*held, dense], processes, strict=True)
        ]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)


def wait_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    match = re.search(r"grpc=(\S+)", process.stdout.readline())
    if match is None:
        raise SystemExit("a process did not become ready: its log is above")
    return match[1]


async def exercise(router: str, workers: Sequence[str]) -> list[int]:
    """Generates a little, so that every buffer is in use; returns the weight bytes of each worker."""
    async with Client(router) as client:
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


if __name__ == "__main__":
    typer.run(main)

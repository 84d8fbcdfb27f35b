"""A killed expert worker that comes back: from its start to its first answer, with and without kept weights.

A worker by hand is started, asked for one row, and killed, again and again; without kept weights it reads them from files
that are in the system's page cache. What a process needs to import the worker's modules is measured beside it, because
that is what is left of a restart. Last, two workers with the same experts run together, and their memory is counted, that of
the files in shared memory included, once.

Run: python benchmarks/worker_restart.py [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
import typer
from harness import options
from harness.result import Figure, Table, conclude, median_figure, ratio_figure
from harness.turns import Side, Turns, take_turns

from moesaic import rpc
from moesaic.v1 import common_pb2, expert_pb2, expert_pb2_grpc

Keep = Literal["auto", "off"]
SIDES: dict[str, Keep] = {"kept": "auto", "read": "off"}
PLACE = "/dev/shm"
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """From the start of a process to its first answer, and the CPU time that it took."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Worker:
    """A running worker and how it started."""

    pid: int
    start: Start


@dataclass(frozen=True, slots=True)
class Program:
    """How workers are started."""

    model: Path
    threads: int
    place: str

    @contextmanager
    def run(self, keep: Keep) -> Iterator[Worker]:
        """A worker that has answered; it is killed at the end."""
        start_s = time.perf_counter()
        command = (
            *(sys.executable, "-m", "expert_worker", "--model", str(self.model), "--expert-dtype", "bf16"),
            *("--threads", str(self.threads), "--keep-weights", keep, "--keep-weights-in", self.place),
        )
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout is not None
                _, _, address = process.stdout.readline().strip().partition("grpc=")
                ask(address)
                wall_s, cpu = time.perf_counter() - start_s, psutil.Process(process.pid).cpu_times()
                yield Worker(process.pid, Start(wall_s, cpu.user + cpu.system))
            finally:
                process.kill()

    def restart(self, keep: Keep) -> Start:
        with self.run(keep) as worker:
            return worker.start

    def memory(self, keep: Keep) -> int:
        """The bytes of two workers with the same experts, and of what they keep."""
        with ExitStack() as running:
            workers = [running.enter_context(self.run(keep)) for _ in range(2)]
            shared = folder_bytes(Path(self.place)) if keep == "auto" else 0
            return sum(own_bytes(worker.pid) for worker in workers) + shared


def main(
    rounds: options.Rounds = 5,
    threads: Annotated[int, typer.Option(min=1, max=256)] = 2,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes worker_restart.json."""
    folder = options.checkpoint(model, quick)
    with tempfile.TemporaryDirectory(prefix="moesaic-bench-", dir=PLACE) as place:
        program = Program(folder, threads, place)
        for keep in SIDES.values():
            program.restart(keep)  # the first worker fills the memory and the page cache
        sides = [Side(name, partial(program.restart, keep)) for name, keep in SIDES.items()]
        turns = take_turns([*sides, Side("imports", import_modules)], options.rules(rounds, quick), "restart")
        memory = {name: program.memory(keep) for name, keep in SIDES.items()}
    conclude(
        "worker_restart",
        out,
        figures=[
            median_figure("restart-kept", "to the first answer, kept", turns, "kept", _wall, "s"),
            ratio_figure("restart-ratio", "kept over read, wall", turns, "kept", "read", _wall),
            ratio_figure("restart-cpu-ratio", "kept over read, CPU", turns, "kept", "read", _cpu),
            Figure(
                "replica-memory",
                "memory of two replicas, kept over read",
                memory["kept"] / memory["read"],
                "x",
            ),
        ],
        tables=[_table(turns), _memory_table(memory)],
        notes=[f"{experts_mib(folder):,.0f} MiB of experts in bfloat16, {threads} threads"],
        quick=quick,
    )


def ask(address: str) -> None:
    """One row for one expert."""
    with rpc.channel(address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        described = stub.Describe(expert_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)
        expert = described.experts[0]
        row = common_pb2.Tensor(
            shape=[1, described.hidden_size],
            dtype=common_pb2.DTYPE_FLOAT32,
            data=torch.ones(described.hidden_size).numpy().tobytes(),
        )
        request = expert_pb2.ComputeRequest(
            layer=expert.address.layer,
            hidden=row,
            experts=[expert_pb2.ExpertRows(slot=expert.address.slot, version=expert.digest, rows=[0])],
            combine=expert_pb2.COMBINE_ROWS,
            timeout_ms=int(CALL_TIMEOUT_S * 1000),
        )
        answer = next(stub.Compute(iter([request]), timeout=CALL_TIMEOUT_S))
        if answer.error.code:
            raise SystemExit(f"the worker refuses: {answer.error.message}")


def import_modules() -> Start:
    """What every worker's process needs before it does anything."""
    before, start_s = psutil.Process().cpu_times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import expert_worker.server"], check=True)
    after = psutil.Process().cpu_times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Start(time.perf_counter() - start_s, cpu_s)


def own_bytes(pid: int) -> int:
    """The memory of a process, without shared memory; what it shares with others by its part."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {line[0]: int(line[1]) for line in lines}
    return (kib["Pss:"] - kib["Pss_Shmem:"]) << 10


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take, each counted once."""
    files = {path.stat().st_ino: path.stat() for path in folder.rglob("*") if path.is_file()}
    return sum(facts.st_blocks * 512 for facts in files.values())


def experts_mib(model: Path) -> float:
    shape = options.read_shape(model)
    return shape.layers * shape.experts * 3 * shape.hidden * shape.inner * 2 / 2**20


def _wall(start: Start) -> float:
    return start.wall_s


def _cpu(start: Start) -> float:
    return start.cpu_s


def _table(turns: Turns[Start]) -> Table:
    names = {"kept": "weights kept", "read": "weights read", "imports": "importing the modules alone"}
    rows = tuple(
        (words, f"{turns.median(name, _wall):.2f}", f"{turns.median(name, _cpu):.2f}")
        for name, words in names.items()
    )
    return Table("From the start of the process to its first answer", ("", "s", "s of CPU"), rows)


def _memory_table(memory: dict[str, int]) -> Table:
    rows = tuple((f"weights {name}", f"{num_bytes / 2**20:,.0f}") for name, num_bytes in memory.items())
    return Table("Two workers with the same experts", ("", "MiB"), rows)


if __name__ == "__main__":
    typer.run(main)

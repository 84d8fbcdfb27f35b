"""Loading experts from the disk, against reading the same files from end to end.

Measured cold and warm, for every form of the weights; and also how much the disk reads when a worker holds a
share of the experts. Both sides take turns. Cold means that the files were dropped from the system's page
cache before each turn. Plain reading is one thread with a buffer of 8 MiB, as `cat` does; loading also
hashes, checks, converts and lays out.

Run: python benchmarks/loading.py [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import options
from harness.result import Figure, Table, conclude, ratio_figure
from harness.turns import Rules, Side, Turns, take_turns

from expert_worker.experts import allocator
from expert_worker.experts.expert import ExpertForm, choose_form
from expert_worker.experts.loader import load_experts
from expert_worker.experts.stored_weight import stored_bytes
from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel, describe_model
from moesaic.settings import ExpertDType

FORMS: tuple[ExpertDType, ...] = ("fp32", "bf16", "int8", "int4")
BUFFER_BYTES = 8 << 20
SHARES = 8


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and its tensor files."""

    checkpoint: Checkpoint
    shape: MoeModel
    files: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> Model:
        checkpoint = open_checkpoint(folder)
        files = {entry.file for entry in checkpoint.tensors.values()}
        return cls(checkpoint, describe_model(checkpoint), tuple(sorted(files)))

    def num_bytes(self, addresses: Sequence[ExpertAddress]) -> int:
        return sum(
            stored_bytes(self.checkpoint, self.shape.experts[address.layer], address) for address in addresses
        )

    def form(self, expert_dtype: ExpertDType) -> ExpertForm:
        modules = (experts.module for experts in self.shape.experts.values())
        return choose_form(expert_dtype, torch.device("cpu"), torch.float32, modules, batch_invariant=False)


def main(
    rounds: options.Rounds = 5,
    threads: Annotated[int, typer.Option(min=1, max=256)] = 2,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes loading.json."""
    torch.set_num_threads(threads)
    allocator.return_freed_memory()  # A worker does so, too.
    of = Model.of(options.checkpoint(model, quick))
    rules = options.rules(rounds, quick)
    cold, warm = (measure(of, rules, cold=cold) for cold in (True, False))
    wanted, read = read_for_a_share(of)
    conclude(
        "loading",
        out,
        figures=[
            _figure("cold", cold),
            _figure("warm", warm),
            Figure("loading-share", f"bytes the disk gave for 1/{SHARES} of the experts", read / wanted, "x"),
        ],
        tables=[
            Table(
                "GB of the files a second",
                ("", "cold", "of plain reading", "warm", "of plain reading"),
                tuple(
                    (name, *(cell for turns in (cold, warm) for cell in _cells(turns, name)))
                    for name in ("plain reading", *FORMS)
                ),
            )
        ],
        notes=[
            f"{of.num_bytes(of.shape.addresses) / 2**20:,.0f} MiB of experts, {threads} threads; a worker that holds "
            f"1/{SHARES} of them asked for {wanted / 2**20:,.0f} MiB"
        ],
        quick=quick,
    )


def measure(model: Model, rules: Rules, *, cold: bool) -> Turns[float]:
    """The bytes a second of every side."""

    def rate(work: Callable[[], int]) -> float:
        if cold:
            forget(model.files)
        start_s = time.perf_counter()
        return work() / (time.perf_counter() - start_s)

    if not cold:
        read_plainly(model.files)
    sides = [Side("plain reading", partial(rate, partial(read_plainly, model.files)))]
    for name in FORMS:
        sides.append(Side(name, partial(rate, partial(load, model, name, model.shape.addresses))))
    return take_turns(sides, rules, "cold" if cold else "warm")


def read_plainly(files: Sequence[Path]) -> int:
    """Reads the files in order; returns the number of bytes."""
    buffer, total = bytearray(BUFFER_BYTES), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def load(model: Model, expert_dtype: ExpertDType, addresses: Sequence[ExpertAddress]) -> int:
    """Loads experts into memory; returns the bytes that they take in the files."""
    held = dict(load_experts(model.checkpoint, model.shape, addresses, model.form(expert_dtype)))
    return model.num_bytes(list(held))


def read_for_a_share(model: Model) -> tuple[int, int]:
    """The bytes of a worker's share of the experts, and the bytes that the disk read for it."""
    share = model.shape.addresses[::SHARES]
    forget(model.files)
    before = disk_bytes()
    load(model, "bf16", share)
    return model.num_bytes(share), disk_bytes() - before


def forget(files: Sequence[Path]) -> None:
    """Drops the files from the page cache; only what has been written to the disk can be dropped."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def disk_bytes() -> int:
    """The bytes that this process has made the disk read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _figure(name: str, turns: Turns[float]) -> Figure:
    title = f"loading float32 experts over plain reading, {name}"
    return ratio_figure(f"loading-{name}", title, turns, "fp32", "plain reading", float)


def _cells(turns: Turns[float], name: str) -> tuple[str, str]:
    ratio = turns.ratio(name, "plain reading", float)
    rates = sorted(turns.values(name, float))
    return f"{rates[len(rates) // 2] / 1e9:.2f}", f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    typer.run(main)

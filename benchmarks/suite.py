"""The standard set: every benchmark in a process of its own, one after another, then the report.

A program that fails or takes too long does not stop the others; the names of those that failed are printed at
the end, and the exit code is not 0. `--quick` is a smoke run on a small model, which shows that the programs
work; it writes to build/bench and never to docs.

Run: make bench, make bench QUICK=1, or python benchmarks/suite.py [--quick] [--only decode,prefill]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from harness import options
from harness.turns import progress

HERE = Path(__file__).resolve().parent
QUICK_FOLDER = HERE.parent / "build" / "bench"
# The longest that one program may take.
TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Program:
    """One program of the set; all programs take `--out` and `--quick`."""

    name: str
    command: tuple[str, ...]


STANDARD = (
    Program("kernels", ("expert_kernels.py",)),
    Program("transport", ("transport.py",)),
    Program("decode", ("decode.py",)),
    Program("prefill", ("prefill.py",)),
    Program("overhead", ("overhead.py",)),
    Program("goodput", ("goodput.py",)),
    Program("prefix", ("prefix.py",)),
    Program("stall", ("stall.py",)),
    Program("load_stall", ("load_stall.py",)),
    Program("tracing", ("variants.py", "tracing", "--rounds", "9")),
    Program("soak", ("soak.py",)),
    Program("placement", ("variants.py", "placement", "--rounds", "3")),
    Program("invariance", ("variants.py", "invariance", "--rounds", "3")),
    Program("wire", ("variants.py", "wire", "--rounds", "3", "--batches", "16")),
    Program("overlap", ("variants.py", "overlap")),
    Program("routers", ("routers.py", "--rounds", "3", "--routers", "1,2")),
    Program("memory", ("memory.py",)),
    Program("loading", ("loading.py", "--rounds", "3")),
    Program("cold_start", ("cold_start.py", "--rounds", "3")),
    Program("workers", ("workers.py", "--rounds", "3")),
    # Last, because it is fitted to the results of the others.
    Program("scaling", ("scaling.py",)),
)


def main(
    only: Annotated[str | None, typer.Option(help="Names of the set, comma-separated; absent: all.")] = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Runs the set and renders docs/performance.md."""
    if quick and out == options.RESULTS:
        out = QUICK_FOLDER
    chosen = [program for program in STANDARD if only is None or program.name in only.split(",")]
    failed = [program.name for program in chosen if not run(program, out, quick)]
    report = (sys.executable, str(HERE / "report.py"), "--results", str(out))
    to = ("--to", str(out / "performance.md")) if quick else ()
    subprocess.run([*report, *to], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(program: Program, out: Path, quick: bool) -> bool:
    """Runs one program; its tables go to the terminal, its result to `out`. Returns whether it succeeded."""
    file, *arguments = program.command
    flags = ["--out", str(out), *(["--quick"] if quick else [])]
    if program.name == "scaling" and quick:
        flags += ["--pictures", str(out)]
    progress(f"== {program.name}")
    started_s = time.monotonic()
    process = subprocess.Popen([sys.executable, str(HERE / file), *arguments, *flags], start_new_session=True)
    try:
        code = process.wait(TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise
        code = -signal.SIGKILL
    progress(
        f"== {program.name}: {'done' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - started_s:.0f} s"
    )
    return code == 0


if __name__ == "__main__":
    typer.run(main)

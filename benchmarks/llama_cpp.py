"""Batch-1 decode against llama.cpp with its experts on an rpc server.

Both sides have the same weights in f32, and work over loopback. Theirs is `llama-bench` with the experts of
every layer on one `ggml-rpc-server`, all threads in each. Ours is a router and one worker with all threads,
over real gRPC (without shared memory). Also reported are ours over shared memory, and llama.cpp in one
process.

Needs a build of llama.cpp with GGML_RPC=ON (`--build` is the folder of llama-bench and ggml-rpc-server) and
the model as GGUF (`peers/write_gguf.py`).

Run: python benchmarks/llama_cpp.py --build FOLDER --gguf FILE
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer
from harness import options
from harness.load import decode, random_prompts
from harness.result import Table, conclude, ratio_figure
from harness.serving import Setup, serve
from harness.turns import Side, take_turns

STEPS = 32
RPC, LOCAL, GRPC, SHARED = "llama.cpp, experts on rpc", "llama.cpp in one process", "gRPC", "shared memory"


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A build and a model."""

    build: Path
    gguf: Path
    threads: int

    def decode(self, *flags: str) -> float:
        """Tokens per second of llama-bench, which warms up by itself."""
        command = [
            *(str(self.build / "llama-bench"), "--model", str(self.gguf), "--threads", str(self.threads)),
            *("--n-prompt", "0", "--n-gen", str(STEPS), "--repetitions", "2", "--output", "json", *flags),
        ]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
        return statistics.median(json.loads(printed)[0]["samples_ts"])

    @contextlib.contextmanager
    def rpc_server(self) -> Iterator[tuple[str, int]]:
        """HOST:PORT and process id of a server that runs inside the context."""
        port = _free_port()
        server = subprocess.Popen(
            [str(self.build / "ggml-rpc-server"), "--threads", str(self.threads), "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(port)
            yield f"127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            server.wait(10)


def main(
    build: Annotated[Path, typer.Option(help="Folder of llama-bench and ggml-rpc-server.", exists=True)],
    gguf: Annotated[
        Path, typer.Option(help="The model, f32, as written by peers/write_gguf.py.", exists=True)
    ],
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes llama_cpp.json."""
    folder = options.checkpoint(model, quick)
    prompts = random_prompts(1, 32, options.read_shape(folder).vocabulary, seed=1)
    theirs = LlamaCpp(build, gguf, len(psutil.Process().cpu_affinity()))
    with (
        theirs.rpc_server() as (address, rpc_pid),
        serve(Setup(folder, settings=options.ON_GRPC)) as grpc,
        serve(Setup(folder)) as shared,
    ):
        on_rpc = ("--n-gpu-layers", "0", "--rpc", address, "--override-tensor", f"exps=RPC0[{address}]")
        turns = take_turns(
            [
                Side(RPC, partial(theirs.decode, *on_rpc), (rpc_pid,)),
                Side(LOCAL, theirs.decode),
                *(
                    Side(name, partial(_ours, site.router, prompts), site.pids)
                    for name, site in ((GRPC, grpc), (SHARED, shared))
                ),
            ],
            options.rules(rounds, quick),
            "llama.cpp",
        )
    speeds = {name: turns.median(name, float) for name in (RPC, LOCAL, GRPC, SHARED)}
    title = "batch-1 decode over llama.cpp with its experts on an rpc server"
    conclude(
        "llama_cpp",
        out,
        figures=[ratio_figure("llamacpp-rpc-b1", title, turns, GRPC, RPC, float)],
        tables=[
            Table(
                "",
                ("batch 1, f32", "tokens/s", "over llama.cpp with rpc"),
                tuple((name, f"{speed:.1f}", f"{speed / speeds[RPC]:.2f}") for name, speed in speeds.items()),
            )
        ],
        data={"tokens_per_s": speeds},
        quick=quick,
    )


def _ours(router: str, prompts: list[tuple[int, ...]]) -> float:
    return decode(router, prompts, STEPS).tokens_per_s


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise SystemExit("the rpc server did not start") from None
            time.sleep(0.05)


if __name__ == "__main__":
    typer.run(main)

"""Moesaic's processes, started by hand on free ports: workers, routers and, where asked for, a gateway."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


# Waiting threads hardly spin; cluster/processes/specs.py sets the same.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is served.

    `settings` has keys of moesaic/settings.py, for example {"engine.shared_memory": "off"}.
    """

    model: Path
    workers: int = 1
    # The routers share the workers; the gateway knows all of them.
    routers: int = 1
    # The controller that the routers follow; None: they are told the workers.
    controller: str | None = None
    # The addresses of workers that already run; without any, `workers` are started.
    shared_workers: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    gateway: bool = False
    # The program of a worker; peers.random_worker is one that makes its own experts.
    worker_module: str = "expert_worker"
    # The threads of each worker; None divides the cores among the workers.
    worker_threads: int | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment of every process: the settings, and threads that wait passively as in a cluster."""
        named = {f"MOESAIC_{key.upper().replace('.', '__')}": value for key, value in self.settings.items()}
        return {**os.environ, **PASSIVE, **named, **self.environment}


@dataclass(frozen=True, slots=True)
class Served:
    """The addresses of a running site, and its process ids by name. Without a router that address is empty."""

    router: str
    workers: tuple[str, ...]
    http: str | None
    processes: Mapping[str, int]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self.processes.values())


@contextmanager
def serve(setup: Setup, num_slots: int = 8) -> Iterator[Served]:
    """Runs the processes of a setup; each worker holds a range of the `num_slots` experts of a layer."""
    cores = len(psutil.Process().cpu_affinity())
    threads = setup.worker_threads or max(1, cores // setup.workers)
    model = ("--model", str(setup.model))
    shares = [
        f"{num_slots * index // setup.workers}-{num_slots * (index + 1) // setup.workers - 1}"
        for index in range(setup.workers)
    ]
    with ExitStack() as stack:
        start = _Starter(stack, setup.variables)
        pids = {
            f"worker-{index}": start(
                setup.worker_module,
                *(*model, "--experts", share, "--name", f"worker-{index}"),
                *("--port", "0", "--threads", str(threads)),
            )
            for index, share in enumerate(() if setup.shared_workers else shares)
        }
        workers = setup.shared_workers or tuple(map(start.address, pids.values()))
        named = [flag for address in workers for flag in ("--worker", address)]
        if setup.controller is not None:
            named = ["--controller", setup.controller]
        routers = ["router", *(f"router-{index}" for index in range(1, setup.routers))][: setup.routers]
        pids |= {name: start("router", *model, "--port", "0", *named) for name in routers}
        addresses = [start.address(pids[name]) for name in routers]
        http = None
        if setup.gateway:
            behind = [flag for address in addresses for flag in ("--router", address)]
            pids["gateway"] = start("gateway", *behind, "--port", "0")
            http = start.address(pids["gateway"])
        yield Served(addresses[0] if addresses else "", workers, http, pids)


class _Starter:
    """Starts processes that end with `stack`, and finds them by their pid."""

    def __init__(self, stack: ExitStack, variables: dict[str, str]) -> None:
        self._stack = stack
        self._variables = variables
        self._running: dict[int, tuple[subprocess.Popen[str], IO[str]]] = {}

    def __call__(self, module: str, *arguments: str) -> int:
        log = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=self._variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._stack.callback(_end, process)
        self._running[process.pid] = process, log
        return process.pid

    def address(self, pid: int) -> str:
        """Waits for the line that names HOST:PORT.

        Raises SystemExit with the process's log when it does not come.
        """
        process, log = self._running[pid]
        timer = threading.Timer(START_TIMEOUT_S, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        match = re.search(r"(?:grpc|http)=(\S+)", line)
        if match is None:
            log.seek(0)
            raise SystemExit(f"a process did not become ready; its log:\n{log.read()[-4000:]}")
        return match[1]


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()

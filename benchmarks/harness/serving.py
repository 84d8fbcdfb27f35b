"""Moesaic's processes, started by hand on free ports: workers, routers and, where asked for, a controller and a gateway."""

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
    # Whether a controller is started, which the routers follow.
    controlled: bool = False
    # How many workers hold each expert; divides `workers`.
    replicas: int = 1
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
    """The addresses of a running site, and its process ids by name."""

    routers: tuple[str, ...]
    workers: tuple[str, ...]
    http: str | None
    processes: Mapping[str, int]

    @property
    def router(self) -> str:
        """The first one; empty without any."""
        return self.routers[0] if self.routers else ""

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self.processes.values())


@contextmanager
def serve(setup: Setup, num_slots: int = 8) -> Iterator[Served]:
    """Runs the processes of a setup; each worker holds a range of the `num_slots` experts of a layer, and with
    replicas several hold the same one."""
    cores = len(psutil.Process().cpu_affinity())
    threads = setup.worker_threads or max(1, cores // setup.workers)
    model = ("--model", str(setup.model))
    num_shares = setup.workers // setup.replicas
    shares = [
        f"{num_slots * index // num_shares}-{num_slots * (index + 1) // num_shares - 1}"
        for index in range(num_shares)
    ] * setup.replicas
    with ExitStack() as stack:
        start = Starter(stack, setup.variables)
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
        controller = setup.controller
        if setup.controlled:
            pids["controller"] = start(
                "cluster.control", *model, "--port", "0", "--workers", ",".join(workers)
            )
            controller = start.address(pids["controller"])
        if controller is not None:
            named = ["--controller", controller]
        routers = ["router", *(f"router-{index}" for index in range(1, setup.routers))][: setup.routers]
        pids |= {name: start("router", *model, "--port", "0", *named) for name in routers}
        addresses = [start.address(pids[name]) for name in routers]
        http = None
        if setup.gateway:
            behind = [flag for address in addresses for flag in ("--router", address)]
            pids["gateway"] = start("gateway", *behind, "--port", "0")
            http = start.address(pids["gateway"])
        yield Served(tuple(addresses), workers, http, pids)


class Starter:
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
        """HOST:PORT of the line that a process prints when it is ready. Raises SystemExit when it does not come."""
        match = re.search(r"(?:grpc|http)=(\S+)", self.ready_line(pid))
        if match is None:
            raise self._failure(pid)
        return match[1]

    def ready_line(self, pid: int) -> str:
        """Waits for the first line that a process prints. Raises SystemExit with its log when none comes."""
        process, _ = self._running[pid]
        timer = threading.Timer(START_TIMEOUT_S, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            raise self._failure(pid)
        return line

    def _failure(self, pid: int) -> SystemExit:
        log = self._running[pid][1]
        log.seek(0)
        return SystemExit(f"a process did not become ready; its log:\n{log.read()[-4000:]}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()

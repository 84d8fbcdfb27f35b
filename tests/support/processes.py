"""Real processes for tests: `python -m expert_worker` and `python -m router` on free ports, ended whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 240.0


class Process:
    """One process of the project. `address` is the HOST:PORT of its ready line."""

    def __init__(self, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1", **(env or {})},
        )
        self._log: list[str] = []
        # A pipe that nobody reads fills up and stops its writer.
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.address = ""

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Waits for the line that names `grpc=HOST:PORT` or `http=HOST:PORT`; a process that ends or dawdles fails the test with its log."""
        timer = threading.Timer(timeout_s, self._popen.kill)
        timer.start()
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        timer.cancel()
        match = re.search(r"(?:grpc|http)=(\S+)", line)
        assert match is not None, f"not ready, printed {line!r}:\n{self.log}"
        self.address = match[1]
        return self.address

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        return "".join(self._log)

    def kill(self) -> None:
        """SIGKILL: the end that a process cannot prepare for."""
        self._popen.kill()
        self._popen.wait(STOP_TIMEOUT_S)

    def stand_still(self) -> None:
        """SIGSTOP; returns when every thread stands still, which takes a moment on a busy machine."""
        self._popen.send_signal(signal.SIGSTOP)
        ends_s = time.monotonic() + STOP_TIMEOUT_S
        while any(_state(thread) != "T" for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            assert time.monotonic() < ends_s, "it runs on after SIGSTOP"
            time.sleep(0.005)

    def go_on(self) -> None:
        """SIGCONT."""
        self._popen.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM, and its exit code. A process that does not end is aborted, and the failure shows the stacks of its threads."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
        try:
            code = self._popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.send_signal(signal.SIGABRT)
            self._popen.wait(STOP_TIMEOUT_S)
            self._reader.join(STOP_TIMEOUT_S)
            raise AssertionError(f"still running {STOP_TIMEOUT_S} s after SIGTERM:\n{self.log}") from None
        self._reader.join(STOP_TIMEOUT_S)
        for pipe in (self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def _read_log(self) -> None:
        assert self._popen.stderr is not None
        self._log.extend(self._popen.stderr)


def _state(thread: Path) -> str:
    """The letter of a thread's state; T is stopped."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def running_workers(model: Path, shares: Sequence[str], *arguments: str) -> Iterator[list[Process]]:
    """One worker process for every share, started side by side; `--experts` syntax, one thread each."""
    workers = [
        Process(
            "expert_worker",
            *("--model", str(model), "--experts", share, "--name", f"worker-{index}"),
            *("--threads", "1", *arguments),
        )
        for index, share in enumerate(shares)
    ]
    try:
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


@contextmanager
def running_router(model: Path, workers: Sequence[Process], *arguments: str) -> Iterator[Process]:
    """A router process over these workers."""
    flags = [flag for worker in workers for flag in ("--worker", worker.address)]
    router = Process("router", "--model", str(model), "--port", "0", *flags, *arguments)
    try:
        router.wait_ready()
        yield router
    finally:
        router.stop()


@contextmanager
def running_gateway(router: Process, *arguments: str) -> Iterator[Process]:
    """A gateway process before this router."""
    gateway = Process("gateway", "--router", router.address, "--port", "0", *arguments)
    try:
        gateway.wait_ready()
        yield gateway
    finally:
        gateway.stop()

"""`moesaic serve` as people start it, in a process of its own, and a count of what is left when it has ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = str(Path(__file__).resolve().parents[2])
MOESAIC = (sys.executable, "-m", "cluster.cli.main")
READY = re.compile(r"ready http=(127\.0\.0\.1:\d+|\[::1?\]:\d+) grpc=(127\.0\.0\.1:\d+|\[::1?\]:\d+)\n")
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 300.0
# Ray's processes learn of each other's end by looking; its agents look once a second.
AFTERMATH_S = 180.0


class Serve:
    """One `moesaic serve` in a session of its own, by which everything that it starts can be told."""

    def __init__(
        self, *arguments: str, temp: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.temp = temp
        self.popen = subprocess.Popen(
            [*MOESAIC, "serve", "--http-port", "0", "--grpc-port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(temp), **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.stdout, self.popen.stdout), (self.stderr, self.popen.stderr))
        ]
        for reader in self._readers:
            reader.start()
        self.http = ""
        self.grpc = ""

    def wait_ready(self) -> None:
        until(lambda: bool(self.stdout) or self.popen.poll() is not None, START_TIMEOUT_S, "ready")
        match = READY.fullmatch("".join(self.stdout))
        assert match is not None, f"printed {self.stdout}:\n{''.join(self.stderr)}"
        self.http, self.grpc = match[1], match[2]

    def wait_stderr(self, text: str) -> None:
        until(lambda: any(text in line for line in self.stderr), START_TIMEOUT_S, text)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to the whole foreground group."""
        os.killpg(self.popen.pid, signal.SIGINT)

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.popen.wait(END_TIMEOUT_S)
        self.close()
        return code

    def close(self) -> None:
        """Closes its output, once no process writes to it any more."""
        for reader in self._readers:
            reader.join(60)
        for pipe in (self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            pipe.close()

    def status(self) -> dict[str, Any]:
        command = [*MOESAIC, "status", "--grpc", self.grpc, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def process(self, name: str) -> dict[str, Any]:
        processes = self.status()["topology"]["processes"]
        return next(process for process in processes if process["name"] == name)

    def members(self) -> list[psutil.Process]:
        """Every process of this cluster that is alive, itself and Ray's included."""
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def assert_nothing_is_left(self) -> None:
        until(
            lambda: not self.members(), AFTERMATH_S, lambda: f"left: {[p.cmdline() for p in self.members()]}"
        )
        left = sorted(map(str, self.temp.rglob("*")))
        assert not left, f"left: {left}"

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            in_session = os.getsid(process.pid) == self.popen.pid
            return in_session and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


def until(condition: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    """Waits for a condition; fails with `what` after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(what if isinstance(what, str) else what())
        time.sleep(0.05)


@contextmanager
def serving(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Serve]:
    """Ended whatever happens; a short path, for Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        serve = Serve(*arguments, temp=Path(temp), env=env, cwd=cwd)
        try:
            yield serve
        finally:
            for process in serve.members():
                process.kill()
            serve.popen.wait(END_TIMEOUT_S)
            serve.close()

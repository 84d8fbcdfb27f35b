"""Several hosts on one machine, each with a Ray node, and `moesaic serve` on one of them.

Hosts are network namespaces, made by a program beside the checkout. Only processes inside of them reach them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.serve_command import END_TIMEOUT_S, MOESAIC, START_TIMEOUT_S, until

ROOT = Path(__file__).parents[2]
NETNS = ROOT.parent / "shared" / "netns" / "netns.py"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
RAY_PORT = 6379
READY = re.compile(r"ready http=(\S+) grpc=(\S+)\n")
COMMAND_TIMEOUT_S = 60.0
# The nodes of one Ray know each other by this; a machine may have a token of its own.
TOKEN = secrets.token_hex(32)


class Hosts:
    """The hosts a, b, c …, of which the first is Ray's head."""

    def __init__(self, lab: Any) -> None:
        self.lab = lab

    def address(self, host: str) -> str:
        address: str = self.lab.address(host)
        return address

    def run(
        self, host: str, *command: str, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """A command in a host, from the folder of the checkout."""
        done: subprocess.CompletedProcess[str] = self.lab.run(
            host, command, capture_output=True, timeout=timeout_s, env=_environment(), cwd=ROOT
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done

    def start_ray(self, host: str, *, num_cpus: int = 4, **environment: str) -> None:
        """A Ray node; `environment` is that of all that it will start."""
        head = ["--head", "--port", str(RAY_PORT), "--include-dashboard", "false", "--disable-usage-stats"]
        join = head if host == "a" else ["--address", self.ray_address]
        settings = [f"{name}={value}" for name, value in environment.items()]
        self.run(
            host,
            *("env", *settings, *RAY, "start", *join, "--node-ip-address", self.address(host)),
            *("--num-cpus", str(num_cpus), "--object-store-memory", str(80 << 20)),
        )

    @property
    def ray_address(self) -> str:
        return f"{self.address('a')}:{RAY_PORT}"

    def start_serve(self, host: str, *arguments: str) -> HostServe:
        return HostServe(self, host, arguments)


class HostServe:
    """One `moesaic serve` on a host, on the Ray of all of them."""

    def __init__(self, hosts: Hosts, host: str, arguments: Sequence[str]) -> None:
        self._hosts = hosts
        self.host = host
        self.popen: subprocess.Popen[str] = hosts.lab.start(
            host,
            [
                *(*MOESAIC, "serve", *arguments, "--address", hosts.ray_address),
                *("--host", hosts.address(host), "--http-port", "0", "--grpc-port", "0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            cwd=ROOT,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.stdout, self.popen.stdout), (self.stderr, self.popen.stderr))
        ]
        for reader in self._readers:
            reader.start()
        self.http = self.grpc = ""

    @property
    def log(self) -> str:
        return "".join(self.stderr)

    def wait_ready(self) -> None:
        until(lambda: bool(self.stdout) or self.popen.poll() is not None, START_TIMEOUT_S, lambda: self.log)
        match = READY.fullmatch("".join(self.stdout))
        assert match is not None, f"printed {self.stdout}:\n{self.log}"
        self.http, self.grpc = match[1], match[2]

    def processes(self) -> dict[str, dict[str, Any]]:
        """The processes of the cluster by name, as `moesaic status` shows them."""
        return {process["name"]: process for process in self.topology()["processes"]}

    def topology(self) -> dict[str, Any]:
        done = self._hosts.run(self.host, *MOESAIC, "status", "--grpc", self.grpc, "--json")
        topology: dict[str, Any] = json.loads(done.stdout)["topology"]
        return topology

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.popen.wait(END_TIMEOUT_S)
        for reader in self._readers:
            reader.join(5.0)
        return code

    def stop(self) -> None:
        """Ends it as Ctrl-C does, and with it all that it has started."""
        if self.popen.poll() is None:
            # What was started is the way into the host, which passes no signals on.
            for process in psutil.Process(self.popen.pid).children():
                process.send_signal(signal.SIGINT)
        self.end()
        for pipe in (self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def running_hosts(count: int) -> Iterator[Hosts]:
    """Hosts without Ray. Skips where they cannot be made."""
    if not NETNS.exists():
        pytest.skip("the program that makes hosts (../shared/netns) is not here")
    if os.geteuid() != 0:
        pytest.skip("making hosts needs root")
    if missing := [program for program in ("ip", "nft", "nsenter", "setpriv") if not shutil.which(program)]:
        pytest.skip(f"making hosts needs {missing[0]}")
    spec = importlib.util.spec_from_file_location("netns", NETNS)
    assert spec is not None and spec.loader is not None
    netns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(netns)
    # Every host has a /tmp of its own, in which the checkout would be missing.
    shared = [str(ROOT)] if ROOT.is_relative_to("/tmp") else []
    with netns.Lab.of(f"moesaic-{os.getpid()}", count, share=shared) as lab:
        yield Hosts(lab)


@contextmanager
def serving_on(hosts: Hosts, host: str, *arguments: str) -> Iterator[HostServe]:
    """A `moesaic serve` that ends whatever happens."""
    serve = hosts.start_serve(host, *arguments)
    try:
        yield serve
    finally:
        serve.stop()


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        # Two cores are all that some machines have for all hosts.
        "MOESAIC_ENGINE__THREADS": "1",
        "MOESAIC_WORKER__THREADS": "1",
    }

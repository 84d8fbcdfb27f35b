"""The processes of a setup as `moesaic serve` starts them: on a Ray of its own, with a gateway in front."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from harness.serving import ROOT, STOP_TIMEOUT_S, Served, Setup

MOESAIC = (sys.executable, "-m", "cluster.cli.main")
STATUS_TIMEOUT_S = 60.0


@contextmanager
def serve_over_ray(setup: Setup) -> Iterator[Served]:
    """Raises SystemExit with the server's log when it does not become ready."""
    command = [*MOESAIC, "serve", str(setup.model), "--json", "--http-port", "0", "--grpc-port", "0"]
    for flag, number in (
        ("--workers", setup.workers),
        ("--replicas", setup.replicas),
        ("--routers", setup.routers),
    ):
        command += [flag, str(number)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=setup.variables, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            ready = _ready(process, log)
            yield _served(_processes(ready["grpc"]), ready["http"])
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def _ready(process: subprocess.Popen[str], log: IO[str]) -> Mapping[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        log.seek(0)
        raise SystemExit(f"the cluster did not become ready; its log:\n{log.read()[-4000:]}")
    ready: Mapping[str, str] = json.loads(line)["ready"]
    return ready


def _processes(grpc: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*MOESAIC, "status", "--grpc", grpc, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=STATUS_TIMEOUT_S,
    )
    processes: list[dict[str, Any]] = json.loads(done.stdout)["topology"]["processes"]
    return processes


def _served(processes: list[dict[str, Any]], http: str) -> Served:
    def addresses(prefix: str) -> tuple[str, ...]:
        return tuple(each["address"] for each in processes if each["name"].startswith(prefix))

    return Served(
        addresses("router"),
        addresses("expert-worker"),
        http,
        {each["name"]: int(each["pid"]) for each in processes},
    )

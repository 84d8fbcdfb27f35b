"""The processes of a setup as `moesaic serve` starts them: on a Ray of its own, with a gateway in front."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from harness.serving import ROOT, Served, Setup, Starter

COMMAND = "cluster.cli.main"
STATUS_TIMEOUT_S = 60.0


@contextmanager
def serve_over_ray(setup: Setup) -> Iterator[Served]:
    """Raises SystemExit with the server's log when it does not become ready."""
    with ExitStack() as stack:
        start = Starter(stack, setup.variables)
        pid = start(
            COMMAND,
            *("serve", str(setup.model), "--json", "--http-port", "0", "--grpc-port", "0"),
            *("--workers", str(setup.workers), "--replicas", str(setup.replicas)),
            *("--routers", str(setup.routers)),
        )
        ready = json.loads(start.ready_line(pid))["ready"]
        yield _served(_processes(ready["grpc"]), ready["http"])


def _processes(grpc: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", COMMAND, "status", "--grpc", grpc, "--json"],
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

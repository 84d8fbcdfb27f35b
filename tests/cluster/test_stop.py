"""However a `moesaic serve` ends, no process, port or file of it stays."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray._raylet import GcsClient
from support.serve_command import AFTERMATH_S, MOESAIC, START_TIMEOUT_S, Serve, serving, until

from moesaic import Client
from moesaic.errors import MoesaicError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
    return True


async def answer_while_stopping(serve: Serve) -> int:
    """Asks for an answer, stops the cluster in the middle of it, and counts its tokens."""
    async with Client(serve.grpc) as client:
        tokens = client.generate([5, 17], max_tokens=200, ignore_eos=True, timeout_s=60)
        first = await anext(tokens)
        serve.interrupt()
        return len(first.token_ids) + sum([len(token.token_ids) async for token in tokens])


def test_ctrl_c_lets_running_answers_end_and_leaves_nothing(tiny: Path) -> None:
    with serving(str(tiny), "--workers", "2") as serve:
        serve.wait_ready()
        assert asyncio.run(answer_while_stopping(serve)) == 200
        assert serve.end() == 0
        serve.assert_nothing_is_left()
        assert is_free(serve.http)
        assert is_free(serve.grpc)


def test_ctrl_c_while_it_starts_leaves_nothing(tiny: Path) -> None:
    with serving(str(tiny), "--workers", "2") as serve:
        until(lambda: len(serve.members()) > 3, START_TIMEOUT_S, "nothing started")
        serve.interrupt()
        assert serve.end() == 0
        assert serve.stdout == []
        assert "stopped\n" in serve.stderr
        serve.assert_nothing_is_left()


def test_a_start_that_fails_says_why_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (folder / "tokenizer.json").write_text("{")
    with serving(str(folder)) as serve:
        assert serve.end() == 1
        assert serve.stdout == []
        assert serve.stderr[-1].startswith("error: router-0: ")
        serve.assert_nothing_is_left()


def test_when_its_ray_dies_the_command_says_so_and_leaves_nothing(tiny: Path) -> None:
    with serving(str(tiny)) as serve:
        serve.wait_ready()
        next(process for process in serve.members() if process.name() == "raylet").kill()
        assert serve.end() == 1
        assert serve.stderr[-1].startswith("error: Ray has died")
        serve.assert_nothing_is_left()


@contextmanager
def running_ray(temp: Path) -> Iterator[str]:
    """A Ray of somebody else, on loopback; HOST:PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--head --block --port {port} --node-ip-address 127.0.0.1 --num-cpus 4 --include-dashboard false"
    ray = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *flags.split(), "--temp-dir", str(temp)],
        env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: raylet_of(ray) is not None, START_TIMEOUT_S, "no Ray started")
        # A head tells where it keeps its state seconds after it answers; a Ray that people join has run for longer.
        until(
            lambda: tells_storage(f"127.0.0.1:{port}"),
            START_TIMEOUT_S,
            "Ray's head does not tell its storage",
        )
        yield f"127.0.0.1:{port}"
    finally:
        processes = [psutil.Process(ray.pid), *psutil.Process(ray.pid).children(recursive=True)]
        ray.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()
        ray.wait(60)


def tells_storage(address: str) -> bool:
    head = GcsClient(address=address)
    return bool(head.internal_kv_get(b"extra_usage_tag_gcs_storage", namespace=b"usage_stats", timeout=30))


def raylet_of(ray: subprocess.Popen[bytes]) -> psutil.Process | None:
    children = psutil.Process(ray.pid).children(recursive=True)
    return next((child for child in children if child.name() == "raylet"), None)


def test_a_ray_that_was_joined_stays_and_ours_are_gone(tiny: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp", ignore_cleanup_errors=True) as temp,
        running_ray(Path(temp)) as address,
        serving(str(tiny), "--address", address) as serve,
    ):
        serve.wait_ready()
        ours = [psutil.Process(process["pid"]) for process in serve.status()["topology"]["processes"]]
        warnings = [line for line in serve.stderr if line.startswith("warning: ")]
        assert len(warnings) == 1 and "Ray's head keeps its state in memory" in warnings[0]
        second = subprocess.run(
            [*MOESAIC, "serve", str(tiny), "--address", address, "--http-port", "0", "--grpc-port", "0"],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        assert second.returncode == 2
        assert "Moesaic serves on this Ray already" in second.stderr
        assert all(process.is_running() for process in ours)
        serve.interrupt()
        assert serve.end() == 0
        until(lambda: not any(map(alive, ours)), AFTERMATH_S, "our processes stayed")
        command = [*MOESAIC, "stop", "--address", address]
        stopped = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert stopped.stdout == "stopped 0 processes\n"


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_sigterm_with_answers_running_ends_them_with_an_error_and_leaves_nothing() -> None:
    """The drain is longer than the three seconds after which the handler that Ray installs would abort."""
    with serving(env={"MOESAIC_CLUSTER__DRAIN_TIMEOUT_S": "5"}) as serve:  # the demo model
        serve.wait_ready()
        reasons = asyncio.run(ends_of_long_answers(serve, 8))
        assert reasons == ["STOPPING"] * 8
        assert serve.end() == 0
        serve.assert_nothing_is_left()


async def ends_of_long_answers(serve: Serve, number: int) -> list[str]:
    """Asks for answers that take longer than a drain, stops the cluster, and says with which error each ended."""

    async def ask(client: Client) -> str:
        stream = client.generate("ROMEO:", max_tokens=2000, ignore_eos=True, timeout_s=120)
        try:
            async for _ in stream:
                begun.set()
        except MoesaicError as error:
            return error.reason
        return ""

    begun = asyncio.Event()
    async with Client(serve.grpc) as client, asyncio.TaskGroup() as group:
        answers = [group.create_task(ask(client)) for _ in range(number)]
        await begun.wait()
        serve.popen.send_signal(signal.SIGTERM)
    return [answer.result() for answer in answers]


@pytest.mark.parametrize("moment", ["Ray: starting", "controller: "])
def test_sigterm_while_it_starts_is_answered_and_leaves_nothing(tiny: Path, moment: str) -> None:
    with serving(str(tiny)) as serve:
        serve.wait_stderr(moment)
        serve.popen.send_signal(signal.SIGTERM)
        assert serve.end() == 0
        assert "stopping: a second signal stops at once\n" in serve.stderr
        serve.assert_nothing_is_left()


def test_a_second_signal_ends_a_start_that_ray_keeps_waiting(tiny: Path) -> None:
    with serving(str(tiny)) as serve:
        until(
            lambda: any(member.name() == "raylet" for member in serve.members()), START_TIMEOUT_S, "no raylet"
        )
        stand_still(serve, "raylet")  # Ray's start would wait for it
        serve.interrupt()
        serve.wait_stderr("stopping: ")
        serve.interrupt()
        assert serve.end() == 0
        serve.assert_nothing_is_left()


def stand_still(serve: Serve, name: str) -> None:
    for process in serve.members():
        if process.name() == name:
            process.suspend()


def test_what_a_killed_server_has_left_is_removed_by_the_next(tiny: Path) -> None:
    with serving(str(tiny)) as killed:
        killed.wait_ready()
        killed.popen.kill()
        killed.popen.wait(60)
        (left,) = killed.temp.iterdir()
        with serving(str(tiny), env={"TMPDIR": str(killed.temp)}) as serve:
            serve.wait_ready()
            assert not left.exists()
            serve.interrupt()
            assert serve.end() == 0

"""`moesaic serve` on a Ray of its own, end to end: it answers, it heals, and it keeps to itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
from support.serve_command import MOESAIC, READY, Serve, until

from moesaic import Client, rpc
from moesaic.errors import MoesaicError
from moesaic.v1 import control_pb2, control_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROMPT = [5, 17, 42, 8]
RECOVERY_S = 180.0


def generate(served: Serve, max_tokens: int = 12) -> tuple[int, ...]:
    async def ask() -> tuple[int, ...]:
        async with Client(served.grpc) as client:
            answer = await client.complete(
                PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout_s=60
            )
            return answer.token_ids

    return asyncio.run(ask())


def generate_again(served: Serve) -> tuple[int, ...]:
    """The answer, as soon as there is one again."""
    deadline_s = time.monotonic() + RECOVERY_S
    while True:
        try:
            return generate(served)
        except MoesaicError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def topology(control_address: str) -> control_pb2.GetTopologyResponse:
    async def ask() -> control_pb2.GetTopologyResponse:
        async with rpc.aio_channel(control_address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            answer: control_pb2.GetTopologyResponse = await stub.GetTopology(
                control_pb2.GetTopologyRequest(), timeout=60
            )
            return answer

    return asyncio.run(ask())


def post(address: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://{address}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def head_of(served: Serve) -> psutil.Process | None:
    """Ray's head; None while there is none."""
    return next((process for process in served.members() if process.name() == "gcs_server"), None)


def test_standard_output_is_the_ready_line_and_nothing_else(served: Serve) -> None:
    assert READY.fullmatch("".join(served.stdout))


def test_http_and_grpc_give_the_same_answer(served: Serve) -> None:
    body = {
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, answer = post(served.http, "/v1/completions", body)
    assert status == 200, answer
    assert tuple(json.loads(answer)["choices"][0]["token_ids"]) == generate(served)


def test_the_status_shows_every_process_ready_and_who_holds_what(served: Serve) -> None:
    status = served.status()
    processes = {process["name"]: process for process in status["topology"]["processes"]}
    assert set(processes) == {"controller", "gateway", "router-0", "expert-worker-0", "expert-worker-1"}
    assert {process["state"] for process in processes.values()} == {"ready"}
    held = [len(processes[f"expert-worker-{index}"]["experts"]) for index in range(2)]
    assert held == [4, 4]
    assert processes["router-0"]["address"] == served.grpc
    assert status["topology"]["epoch"] == status["model"]["epoch"]


def test_one_look_shows_every_router_and_worker(served: Serve) -> None:
    look = [*MOESAIC, "top", "--grpc", served.grpc, "--interval", "0.2"]
    printed = subprocess.run(
        [*look, "--json"], capture_output=True, text=True, timeout=180, check=True
    ).stdout
    plain = json.loads(printed)
    assert [router["state"] for router in plain["routers"]] == ["ready"]
    assert [worker["state"] for worker in plain["workers"]] == ["ready", "ready"]
    shown = subprocess.run([*look, "--once"], capture_output=True, text=True, timeout=180, check=True).stdout
    assert "expert-worker-1" in shown


def test_nothing_listens_but_on_loopback(served: Serve) -> None:
    listening = {
        connection.laddr.ip
        for process in served.members()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert listening


def test_ray_refuses_whoever_has_no_token(served: Serve) -> None:
    head = head_of(served)
    assert head is not None
    port = next(
        connection.laddr.port
        for connection in head.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    )

    def ask(**options: Any) -> grpc.StatusCode:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            try:
                call(b"", timeout=60, **options)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    token = head.environ()["RAY_AUTH_TOKEN"]
    assert ask() == grpc.StatusCode.UNAUTHENTICATED
    assert ask(metadata=[("authorization", "Bearer wrong")]) == grpc.StatusCode.UNAUTHENTICATED
    assert ask(metadata=[("authorization", f"Bearer {token}")]) == grpc.StatusCode.OK


def test_a_killed_worker_leaves_the_table_and_comes_back(served: Serve) -> None:
    expected = generate(served)
    control = served.process("controller")["address"]
    victim = served.process("expert-worker-1")
    before = topology(control)
    os.kill(victim["pid"], signal.SIGKILL)
    until(lambda: topology(control).revision > before.revision, RECOVERY_S, "the table did not change")
    assert generate_again(served) == expected
    after = served.process("expert-worker-1")
    assert (after["state"], after["restarts"]) == ("ready", victim["restarts"] + 1)
    assert after["pid"] != victim["pid"]


def test_without_the_controller_serving_goes_on_and_it_finds_its_way_back(served: Serve) -> None:
    expected = generate(served)
    before = served.status()["topology"]
    os.kill(served.process("controller")["pid"], signal.SIGKILL)
    assert generate(served) == expected

    def is_back() -> bool:
        topology = served.status()["topology"]
        return topology is not None and all(p["state"] == "ready" for p in topology["processes"])

    until(is_back, RECOVERY_S, "the controller did not come back")
    after = served.status()["topology"]
    assert after["revision"] > before["revision"]
    assert after["epoch"] == before["epoch"]
    assert generate(served) == expected


def test_a_controller_that_sleeps_takes_no_replica_away_when_it_wakes(served: Serve) -> None:
    expected = generate(served)
    before = served.status()["topology"]
    controller = served.process("controller")["pid"]
    with ThreadPoolExecutor() as pool:
        ended = threading.Event()

        def stream() -> list[tuple[int, ...]]:
            answers = []
            while not ended.is_set():
                answers.append(generate(served))
            return answers

        streams = [pool.submit(stream) for _ in range(4)]
        try:
            os.kill(controller, signal.SIGSTOP)
            time.sleep(12.0)
            os.kill(controller, signal.SIGCONT)
            until(lambda: served.status()["topology"] is not None, RECOVERY_S, "the controller sleeps on")
            time.sleep(2.0)
        finally:
            os.kill(controller, signal.SIGCONT)
            ended.set()
    assert {answer for answers in streams for answer in answers.result()} == {expected}
    assert served.status()["topology"]["revision"] == before["revision"]


def test_a_killed_router_comes_back_at_the_address_of_the_ready_line(served: Serve) -> None:
    expected = generate(served)
    os.kill(served.process("router-0")["pid"], signal.SIGKILL)
    assert generate_again(served) == expected


def test_a_killed_head_of_ray_costs_no_request_and_comes_back_with_all_it_knew(served: Serve) -> None:
    expected = generate(served)
    victim = served.process("expert-worker-1")
    dead = head_of(served)
    assert dead is not None
    with ThreadPoolExecutor() as pool:
        ended = threading.Event()

        def stream() -> list[tuple[int, ...]]:
            answers = []
            while not ended.is_set():
                answers.append(generate(served))
            return answers

        streams = [pool.submit(stream) for _ in range(2)]
        try:
            dead.kill()
            until(lambda: head_of(served) not in (None, dead), RECOVERY_S, "the head did not come back")
            assert generate(served) == expected
        finally:
            ended.set()
    assert {answer for answers in streams for answer in answers.result()} == {expected}

    lines_before = len(served.stderr)
    os.kill(victim["pid"], signal.SIGKILL)
    assert generate_again(served) == expected
    after = served.process("expert-worker-1")
    assert (after["state"], after["restarts"]) == ("ready", victim["restarts"] + 1)
    until(
        lambda: any("experts loaded" in line for line in served.stderr[lines_before:]),
        RECOVERY_S,
        "the new head does not pass on what the processes log",
    )

"""The direct port of real worker processes, for callers that know gRPC and nothing else of ours."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from support.checkpoints import write_mixtral
from support.expert_calls import ReferenceExperts, compute_request
from support.processes import Process, running_workers
from support.wire_tensors import from_wire

from moesaic import rpc
from moesaic.epoch import ExpertAddress, versions_from_proto
from moesaic.errors import from_status
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire.messages import COMPUTE_METHOD

WAIT_S = 240.0
HIDDEN = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
# Sends what it finds in a file, says when the first answer came, and would wait for the others for ever.
CALLER = """
import sys
from pathlib import Path
from moesaic import rpc
from moesaic.v1 import expert_pb2, expert_pb2_grpc
port, file, count = sys.argv[1:]
request = expert_pb2.ComputeRequest.FromString(Path(file).read_bytes())
with rpc.channel(f"127.0.0.1:{port}") as channel:
    answers = expert_pb2_grpc.ExpertServiceStub(channel).Compute(iter([request] * int(count)))
    print(next(answers).call_id, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Stubs:
    """Both ports of one worker."""

    main: Any
    direct: Any
    port: int
    versions: dict[ExpertAddress, bytes]

    def stats(self) -> expert_pb2.GetWorkerStatsResponse:
        stats: expert_pb2.GetWorkerStatsResponse = self.main.GetWorkerStats(
            expert_pb2.GetWorkerStatsRequest(), timeout=WAIT_S
        )
        return stats


@contextmanager
def stubs_to(worker: Process) -> Iterator[Stubs]:
    with rpc.channel(worker.address) as channel:
        main = expert_pb2_grpc.ExpertServiceStub(channel)
        described = main.Describe(expert_pb2.DescribeRequest(), timeout=WAIT_S)
        versions = dict(versions_from_proto(described.experts))
        # Of another host, so that it gets no shared memory.
        opened = main.OpenTransports(expert_pb2.OpenTransportsRequest(host_id="another"), timeout=WAIT_S)
        assert not opened.socket_path
        with rpc.channel(f"127.0.0.1:{opened.direct_port}") as direct_channel:
            stub = expert_pb2_grpc.ExpertServiceStub(direct_channel)
            yield Stubs(main, stub, opened.direct_port, versions)


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """Its passes of some hundred rows take long enough to be met in the middle."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_local_experts": 2, "num_hidden_layers": 1}
    return write_mixtral(tmp_path / "slow", **sizes)


def slow_request(stubs: Stubs, call_id: int = 0, num_rows: int = 1024) -> expert_pb2.ComputeRequest:
    every_row = list(range(num_rows))
    return compute_request(
        torch.randn(num_rows, 256),
        {0: every_row, 1: every_row},
        stubs.versions,
        call_id=call_id,
        timeout_ms=240_000,
    )


def outcome(answer: expert_pb2.ComputeResponse) -> tuple[int, str, str, str | None]:
    """Whose answer it is and what it says, but for the numbers."""
    if answer.HasField("output"):
        return answer.call_id, "answered", "", None
    error = from_status(answer.error)
    return answer.call_id, error.reason, error.message, error.field


@pytest.mark.shared
def test_a_grpcio_channel_gets_the_rows_of_the_reference_checkpoint(shared: Path) -> None:
    folder = shared / "goldens" / "mixtral" / "hf_v4"
    rows = {5: [0, 2, 6], 4: [1], 7: [0, 1, 2, 3, 4, 5, 6]}
    with running_workers(folder, ["4-7"]) as (worker,), stubs_to(worker) as stubs:
        request = compute_request(HIDDEN, rows, stubs.versions, layer=1)
        (response,) = stubs.direct.Compute(iter([request]), timeout=WAIT_S)
        expected = ReferenceExperts(folder).rows(1, HIDDEN, rows)
        torch.testing.assert_close(from_wire(response.output), expected, atol=1e-5, rtol=1e-5)


def test_both_ways_give_the_same_bits_and_the_same_refusals(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    hidden = HIDDEN[:, :32]
    with running_workers(tmp_path, ["0:0-1,1:3"]) as (worker,), stubs_to(worker) as stubs:
        wrong_version = compute_request(hidden, {1: [0]}, stubs.versions, call_id=6)
        wrong_version.experts[0].version = bytes(32)
        requests = [
            compute_request(hidden, {0: [0, 2], 1: [1]}, stubs.versions, call_id=0),
            compute_request(hidden, {3: list(range(7))}, stubs.versions, call_id=1, layer=1),
            compute_request(hidden, {2: [0]}, stubs.versions, call_id=2),
            compute_request(hidden[:, :31], {1: [0]}, stubs.versions, call_id=3),
            compute_request(hidden, {1: [7]}, stubs.versions, call_id=4),
            compute_request(hidden, {1: [0]}, stubs.versions, call_id=5, timeout_ms=0),
            wrong_version,
            compute_request(torch.full((1, 32), float("inf")), {1: [0]}, stubs.versions, call_id=7),
        ]
        for request in requests:
            (over_main,) = stubs.main.Compute(iter([request]), timeout=WAIT_S)
            (over_direct,) = stubs.direct.Compute(iter([request]), timeout=WAIT_S)
            assert outcome(over_direct) == outcome(over_main)
            assert over_direct.output == over_main.output
            assert over_direct.versions == over_main.versions
        stats = stubs.stats()
        assert (stats.calls, stats.direct_calls, stats.refused_calls) == (4, 2, 12)
        for address in (worker.address, f"127.0.0.1:{stubs.port}"):
            with rpc.channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(COMPUTE_METHOD)(iter([b"\xff" * 4]), timeout=WAIT_S))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "the call is not a ComputeRequest"


def test_many_calls_of_several_callers_are_in_flight_and_each_gets_its_own_rows(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    hidden = HIDDEN[:, :32]
    reference = ReferenceExperts(tmp_path)
    with running_workers(tmp_path, ["all"]) as (worker,), stubs_to(worker) as stubs:
        failures: list[str] = []

        def call(stub: Any, seed: int) -> None:
            requests = {
                call_id: compute_request(
                    hidden, {seed: [call_id % 7]}, stubs.versions, layer=call_id % 2, call_id=call_id
                )
                for call_id in range(12)
            }
            for answer in stub.Compute(iter(list(requests.values())), timeout=WAIT_S):
                layer, row = answer.call_id % 2, answer.call_id % 7
                expected = reference.rows(layer, hidden, {seed: [row]})
                if not torch.allclose(from_wire(answer.output), expected, atol=1e-5, rtol=1e-5):
                    failures.append(f"caller {seed}, call {answer.call_id}")
                del requests[answer.call_id]
            failures.extend(f"caller {seed}, call {call_id}: no answer" for call_id in requests)

        callers = [
            threading.Thread(target=call, args=(stubs.main if seed == 3 else stubs.direct, seed))
            for seed in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(WAIT_S)
        assert not failures
        assert stubs.stats().direct_calls == 36


def test_calls_that_run_when_sigterm_comes_are_answered_and_open_connections_keep_nobody(
    slow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the calls that were read take longer than the default allows.
    monkeypatch.setenv("MOESAIC_CLUSTER__DRAIN_TIMEOUT_S", str(WAIT_S))
    with running_workers(slow_model, ["all"]) as (worker,), stubs_to(worker) as stubs:
        ended = threading.Event()
        idle = stubs.direct.Compute(iter(ended.wait, True), timeout=WAIT_S)
        requests = [slow_request(stubs, 0, 1900), *(slow_request(stubs, call_id) for call_id in range(1, 16))]
        with in_the_middle_of_a_pass(worker):
            responses = stubs.direct.Compute(iter(requests), timeout=WAIT_S)
        with ThreadPoolExecutor() as pool:
            stopping, reading = pool.submit(worker.stop), pool.submit(answers_before_the_end, responses)
            with pytest.raises(grpc.RpcError) as caught:
                list(idle)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            answers = reading.result(WAIT_S)
            ended.set()
            assert stopping.result(WAIT_S) == 0
    assert outcome(answers[0]) == (0, "answered", "", None)
    assert {reason for _, reason, _, _ in map(outcome, answers)} <= {"answered", "UNAVAILABLE"}
    assert "Traceback" not in worker.log


def answers_before_the_end(
    responses: Iterable[expert_pb2.ComputeResponse],
) -> list[expert_pb2.ComputeResponse]:
    answers: list[expert_pb2.ComputeResponse] = []
    with suppress(grpc.RpcError):
        answers.extend(responses)
    return answers


@contextmanager
def in_the_middle_of_a_pass(worker: Process) -> Iterator[None]:
    """Ends when the worker has computed for a while: longer than it takes to read a call, shorter than a large pass."""
    process = psutil.Process(worker.pid)
    before_s, ends_s = process.cpu_times().user, time.monotonic() + WAIT_S
    yield
    while process.cpu_times().user < before_s + 0.2:
        assert time.monotonic() < ends_s, "it computes nothing"
        time.sleep(0.005)


def test_a_caller_that_is_killed_in_the_middle_leaves_the_worker_to_the_others(
    slow_model: Path, tmp_path: Path
) -> None:
    with running_workers(slow_model, ["all"]) as (worker,), stubs_to(worker) as stubs:
        file = tmp_path / "call"
        file.write_bytes(slow_request(stubs).SerializeToString())
        with subprocess.Popen(
            [sys.executable, "-c", CALLER, str(stubs.port), str(file), "48"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as caller:
            assert caller.stdout is not None and caller.stdout.readline() == b"0\n"
            caller.send_signal(signal.SIGKILL)
            caller.wait(WAIT_S)
            (answer,) = stubs.direct.Compute(iter([slow_request(stubs, 1)]), timeout=WAIT_S)
        assert outcome(answer) == (1, "answered", "", None)
        assert stubs.stats().calls < 49, "what the other one had asked for was dropped"


def test_a_worker_may_have_no_such_port(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    with running_workers(tmp_path, ["all"], "--direct-stream", "off") as (worker,):
        with rpc.channel(worker.address) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            opened = stub.OpenTransports(expert_pb2.OpenTransportsRequest(), timeout=WAIT_S)
        assert opened.direct_port == 0 and opened.incarnation

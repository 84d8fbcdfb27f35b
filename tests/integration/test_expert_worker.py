"""Expert workers as real processes over real sockets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.checkpoints import Layout, write_mixtral
from support.expert_calls import ReferenceExperts, compute_request
from support.processes import Process, running_workers
from support.wire_tensors import from_wire

from moesaic import rpc
from moesaic.epoch import ExpertAddress, versions_from_proto
from moesaic.errors import from_status
from moesaic.v1 import expert_pb2, expert_pb2_grpc

HIDDEN = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))


@contextmanager
def connected(worker: Process) -> Iterator[Any]:
    with rpc.channel(worker.address) as channel:
        yield expert_pb2_grpc.ExpertServiceStub(channel)


def held_versions(stub: Any) -> dict[ExpertAddress, bytes]:
    return dict(versions_from_proto(stub.Describe(expert_pb2.DescribeRequest(), timeout=60).experts))


def compute(stub: Any, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
    response: expert_pb2.ComputeResponse = next(stub.Compute(iter([request]), timeout=60))
    return response


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) << 10


@pytest.mark.shared
def test_both_reference_layouts_are_computed_alike_by_worker_processes(shared: Path) -> None:
    folders = [shared / "goldens" / "mixtral" / name for name in ("hf_v4", "hf_v5_fused")]
    rows = {5: [0, 2, 6], 4: [1], 7: [0, 1, 2, 3, 4, 5, 6]}
    outputs, versions = [], []
    for folder in folders:
        with running_workers(folder, ["4-7"]) as (worker,), connected(worker) as stub:
            versions.append(held_versions(stub))
            response = compute(stub, compute_request(HIDDEN, rows, versions[-1], layer=1))
            outputs.append(from_wire(response.output))
    assert versions[0] == versions[1] and len(versions[0]) == 8
    assert torch.equal(outputs[0], outputs[1])
    expected = ReferenceExperts(folders[0]).rows(1, HIDDEN, rows)
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)


def test_a_process_survives_wrong_calls_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    hidden = HIDDEN[:, :32]
    with running_workers(tmp_path, ["0:0-1,1:3"]) as (worker,), connected(worker) as stub:
        versions = held_versions(stub)
        assert versions.keys() == {(0, 0), (0, 1), (1, 3)}
        good = compute_request(hidden, {1: [0, 3]}, versions)
        wrong = [
            compute_request(hidden, {2: [0]}, versions),
            compute_request(hidden[:, :31], {1: [0]}, versions),
            compute_request(hidden, {1: [7]}, versions),
            compute_request(hidden, {1: [0]}, versions, timeout_ms=0),
        ]
        answers = list(stub.Compute(iter([*wrong, good]), timeout=60))
        assert sum(answer.HasField("error") for answer in answers) == 4
        expected = ReferenceExperts(tmp_path).rows(0, hidden, {1: [0, 3]})
        (output,) = [from_wire(answer.output) for answer in answers if answer.HasField("output")]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert worker.stop() == 0
    assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("arguments", "bits", "error"),
    [
        (["--expert-dtype", "bf16"], 16, 0.01),
        (["--dtype", "bfloat16", "--expert-dtype", "fp32"], 32, 1e-6),
        (["--expert-dtype", "int8"], 8, 0.05),
        (["--dtype", "bfloat16", "--expert-dtype", "int8"], 8, 0.05),
        (["--expert-dtype", "int4"], 4, 0.25),
    ],
)
def test_experts_in_fewer_bits_take_less_memory_and_answer_in_the_dtype_of_the_rows(
    tmp_path: Path, arguments: list[str], bits: int, error: float
) -> None:
    write_mixtral(tmp_path, hidden_size=64, intermediate_size=128)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    rows = {2: [0, 3, 6], 1: [1]}
    with running_workers(tmp_path, ["all"], *arguments) as (worker,), connected(worker) as stub:
        described = stub.Describe(expert_pb2.DescribeRequest(), timeout=60)
        response = compute(stub, compute_request(hidden, rows, held_versions(stub)))
    weights = 2 * 4 * 3 * 64 * 128
    # Scales are the rest; in int4 they are many.
    assert weights * bits // 8 <= described.weight_bytes <= weights * (bits + 1.5) / 8
    output = from_wire(response.output)
    assert output.dtype == torch.float32
    expected = ReferenceExperts(tmp_path).rows(0, hidden, rows)
    assert (output - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("expert_dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_batch_invariant_worker_gives_a_row_the_same_bits_in_any_call(
    tmp_path: Path, expert_dtype: str
) -> None:
    write_mixtral(tmp_path, hidden_size=64, intermediate_size=1056, num_local_experts=2)
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    arguments = ["--expert-dtype", expert_dtype, "--batch-invariant"]
    with running_workers(tmp_path, ["all"], *arguments) as (worker,), connected(worker) as stub:
        versions = held_versions(stub)
        together = from_wire(compute(stub, compute_request(hidden, {1: list(range(40))}, versions)).output)
        for row in (0, 7, 15, 16, 39):
            alone = compute(stub, compute_request(hidden[row : row + 1], {1: [0]}, versions))
            assert torch.equal(from_wire(alone.output)[0], together[row])


def test_calls_that_run_when_sigterm_comes_are_answered(tmp_path: Path) -> None:
    """Enough work is queued that the signal finds the compute thread in the middle of it."""
    write_mixtral(tmp_path, hidden_size=256, intermediate_size=2048, num_local_experts=2, num_hidden_layers=1)
    hidden, every_row = torch.randn(1024, 256), list(range(1024))
    with running_workers(tmp_path, ["all"]) as (worker,), connected(worker) as stub:
        versions = held_versions(stub)
        requests = [
            compute_request(hidden, {0: every_row, 1: every_row}, versions, call_id=call_id)
            for call_id in range(8)
        ]
        responses = stub.Compute(iter(requests), timeout=60)
        answers = [next(responses)]
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(read_to_the_end, responses, answers)
            assert worker.stop() == 0
            assert reading.result(60) in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    assert len(answers) > 1
    for answer in answers:
        assert answer.HasField("output") or from_status(answer.error).code == grpc.StatusCode.UNAVAILABLE


def read_to_the_end(responses: Any, answers: list[expert_pb2.ComputeResponse]) -> grpc.StatusCode:
    try:
        answers.extend(responses)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("layout", ["classic", "fused"])
def test_a_process_holds_its_share_and_little_more(tmp_path: Path, layout: Layout) -> None:
    """Two layers of eight experts of 6 MiB: one worker has an eighth of them, another one has all."""
    expert_bytes = 3 * 512 * 1024 * 4
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
    write_mixtral(tmp_path, layout=layout, max_shard_size="40MB", **sizes)
    with running_workers(tmp_path, ["0", "all"], "--threads", "2") as workers:
        resident, peak = [], []
        for worker in workers:
            with connected(worker) as stub:
                stats = stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=60)
            resident.append(stats.resident_bytes)
            peak.append(peak_bytes(worker.pid))
    without_experts = resident[0] - 2 * expert_bytes
    assert resident[1] == pytest.approx(without_experts + 16 * expert_bytes, rel=0.05)
    # While it loads, two threads each have what an expert is laid out from beside the share.
    for num_experts, most in zip((2, 16), peak, strict=True):
        assert most < without_experts + (num_experts + 2) * expert_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}/nowhere"], "--model {tmp}/nowhere: no such folder"),
        (["--model", "{tmp}/tiny", "--experts", "0-9"], "--experts 0-9: the model has 4 slots"),
        (["--model", "{tmp}/tiny", "--device", "tpu"], "--device tpu: must be one of auto, cpu, cuda"),
        (["--model", "{tmp}/tiny", "--expert-dtype", "int4"], "--expert-dtype int4: int4 needs"),
        (["--model", "{tmp}/tiny", "--expert-dtype", "int3"], "--expert-dtype int3: must be one of"),
    ],
)
def test_a_worker_that_cannot_serve_says_why_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_mixtral(tmp_path / "tiny")
    run = subprocess.run(
        [sys.executable, "-m", "expert_worker", *(argument.format(tmp=tmp_path) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 2
    assert not run.stdout
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {message.format(tmp=tmp_path)}")


def test_a_worker_imports_neither_ray_nor_transformers() -> None:
    program = (
        "import sys; sys.modules['ray'] = sys.modules['transformers'] = None\n"
        "import expert_worker.__main__, expert_worker.server; print('fine')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert run.stdout == "fine\n"

"""What it costs to send rows to a worker and back: encodings, sockets, a wave to four workers, a wide layer.

1. Encodings of a call: a plain protobuf `bytes` field, ours (moesaic/wire/messages.py: the same bytes on the
   wire, one copy less each time), and raw bytes without any message; alone, and echoed by another process
   over one gRPC stream, by TCP and by a unix socket.
2. A wave: 8 KiB to each of four workers and back, through the dispatcher, the links and the workers' own
   service, whose experts return their rows; over gRPC (the direct stream, as routers use it between hosts),
   over gRPC by the threads of grpcio alone, and over shared memory, against four processes that echo over
   bare unix sockets. Reported with it is the least that such a wave costs: four processes that echo raw bytes
   over streams of grpcio, and four that read the messages of the data plane, gather their rows and answer, in
   as few lines as that takes (peers/plain_wave.py); and also the cost of one row to one of the workers.
3. A layer call of 64 rows x 2048 bfloat16, top 8 of 128, two such workers, combine: sum.

Run: python benchmarks/transport.py [--rounds 5] [--part encodings|wave|layer]
"""

from __future__ import annotations

import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import grpc
import torch
import typer
from harness import options
from harness.one_transport import call_until_open, pool_of
from harness.result import Figure, Table, conclude, median_figure, ratio_figure
from harness.turns import Rules, Side, take_turns
from peers.echo import read_frame
from peers.identity_worker import identity_version
from peers.plain_wave import PlainWave

from moesaic import rpc
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.messages import Framed, decode_request, decode_response, encode_request
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.gating.model_view import ModelView, ViewRows
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind

PEERS = Path(__file__).parent / "peers"
SIZES = {"8 KiB": 8 << 10, "128 KiB": 128 << 10, "2 MiB": 2 << 20, "16 MiB": 16 << 20}
ENCODINGS = ("protobuf field", "ours", "raw bytes")
METHODS = dict(zip(ENCODINGS, ("Plain", "Ours", "Raw"), strict=True))
TRANSPORTS: dict[str, TransportKind] = {"gRPC, grpcio": GRPC, "gRPC": DIRECT, "shared memory": SHARED_MEMORY}
JUDGED_WAVES = {"gRPC": "wave-grpc", "shared memory": "wave-shared-memory"}
WAVE_WORKERS, WAVE_HIDDEN = 4, 2048
LAYER_ROWS, LAYER_HIDDEN, LAYER_SLOTS, LAYER_TOP_K, LAYER_WORKERS = 64, 2048, 128, 8, 2
# Enough for buffers to be open and caches to be filled.
WARM_UP_CALLS = 200
DEADLINE_S = 30.0

Seconds = float


def main(
    part: Annotated[str, typer.Option(help="encodings, wave or layer; absent: all.")] = "",
    rounds: options.Rounds = 5,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes transport.json."""
    torch.set_num_threads(1)
    rules = options.rules(rounds, quick)
    figures: list[Figure] = []
    tables: list[Table] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if part in ("", "encodings"):
            tables += [_encode_table(quick), _round_trip_table(folder, rules, quick)]
        if part in ("", "wave"):
            figures += _wave(folder, rules, quick)
        if part in ("", "layer"):
            figures += _layer(rules, quick)
    conclude("transport", out, figures=figures, tables=tables, quick=quick)


# Encodings


def _message(num_bytes: int) -> tuple[expert_pb2.ComputeRequest, bytes]:
    """A call to two experts, and its rows."""
    header = common_pb2.Tensor(dtype=common_pb2.DTYPE_BFLOAT16, shape=[num_bytes // 4096, 2048])
    experts = [expert_pb2.ExpertRows(slot=slot, version=identity_version(slot), rows=[0]) for slot in (1, 2)]
    request = expert_pb2.ComputeRequest(
        call_id=1, epoch="0123456789abcdef", layer=3, hidden=header, experts=experts, timeout_ms=30_000
    )
    return request, bytes(num_bytes)


def _encode_plain(request: expert_pb2.ComputeRequest, data: memoryview) -> bytes:
    message = expert_pb2.ComputeRequest()
    message.CopyFrom(request)
    message.hidden.data = bytes(data)
    return message.SerializeToString()


def _decode_plain(raw: bytes) -> int:
    return len(expert_pb2.ComputeRequest.FromString(raw).hidden.data)


def _encode(encoding: str, request: expert_pb2.ComputeRequest, data: memoryview) -> bytes:
    if encoding == "protobuf field":
        return _encode_plain(request, data)
    return encode_request(Framed(request, data)) if encoding == "ours" else bytes(data)


def _decode(encoding: str, raw: bytes) -> int:
    if encoding == "protobuf field":
        return _decode_plain(raw)
    return decode_request(raw).data.nbytes if encoding == "ours" else memoryview(raw).nbytes


def _encode_table(quick: bool) -> Table:
    rows = []
    for label, num_bytes in SIZES.items():
        request, data = _message(num_bytes)
        cells = [label]
        for encoding in ENCODINGS:
            encode = partial(_encode, encoding, request, memoryview(data))
            decode = partial(_decode, encoding, encode())
            repeats = 5 if quick else max(7, min(2000, (256 << 20) // num_bytes))
            cells.append(" / ".join(_us(_median_s(one, repeats)) for one in (encode, decode)))
        rows.append(tuple(cells))
    return Table("Encode / decode of one call, microseconds", ("rows", *ENCODINGS), tuple(rows))


def _round_trip_table(folder: Path, rules: Rules, quick: bool) -> Table:
    rows = []
    with ExitStack() as stack:
        port = stack.enter_context(_peer("echo.py", "grpc", "127.0.0.1:0"))[-1]
        stack.enter_context(_peer("echo.py", "grpc", f"unix:{folder}/echo"))
        targets = {"TCP": f"127.0.0.1:{port}", "unix": f"unix:{folder}/echo"}
        streams = {
            (name, encoding): stack.enter_context(_echo_stream(target, METHODS[encoding]))
            for name, target in targets.items()
            for encoding in ENCODINGS
        }
        for label, num_bytes in SIZES.items():
            request, data = _message(num_bytes)
            repeats = 5 if quick else max(5, min(300, (64 << 20) // num_bytes))
            turns = take_turns(
                [
                    Side(
                        f"{name}, {encoding}",
                        partial(_echo, stream, encoding, request, memoryview(data), repeats),
                    )
                    for (name, encoding), stream in streams.items()
                ],
                rules,
                f"echo, {label}",
            )
            rows += [
                (
                    f"{label}, {name}",
                    *(_us(turns.median(f"{name}, {encoding}", float)) for encoding in ENCODINGS),
                )
                for name in targets
            ]
    return Table(
        "Round trip over a gRPC stream to another process that decodes and encodes as well, microseconds",
        ("rows", *ENCODINGS),
        tuple(rows),
    )


class _EchoStream:
    """A stream whose messages another process sends back."""

    def __init__(self, channel: grpc.Channel, method: str) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: Iterator[bytes] = channel.stream_stream(f"/Echo/{method}")(
            iter(self._outbox.get, None)
        )

    def send(self, raw: bytes | None) -> None:
        """Sends a message; None ends the stream."""
        self._outbox.put(raw)

    def receive(self) -> bytes:
        return next(self._answers)


@contextmanager
def _echo_stream(target: str, method: str) -> Iterator[_EchoStream]:
    channel = rpc.channel(target)
    stream = _EchoStream(channel, method)
    try:
        yield stream
    finally:
        stream.send(None)
        channel.close()


def _echo(
    stream: _EchoStream,
    encoding: str,
    request: expert_pb2.ComputeRequest,
    data: memoryview,
    repeats: int,
) -> Seconds:
    def once() -> None:
        stream.send(_encode(encoding, request, data))
        # The answer holds the rows in another field, which costs as much to read.
        _decode_answer(encoding, stream.receive())

    return _median_s(once, repeats)


def _decode_answer(encoding: str, raw: bytes) -> int:
    if encoding == "protobuf field":
        return len(expert_pb2.ComputeResponse.FromString(raw).output.data)
    return decode_response(raw).data.nbytes if encoding == "ours" else len(raw)


# A wave to four workers


def _wave(folder: Path, rules: Rules, quick: bool) -> list[Figure]:
    repeats = 20 if quick else 300
    # One token, one expert on each worker: a row of 8 KiB to each, and one back.
    hidden = torch.randn(1, WAVE_HIDDEN)
    slots = torch.arange(WAVE_WORKERS)[None]
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(_echo_socket(f"{folder}/{i}", hidden.nbytes)) for i in range(WAVE_WORKERS)
        ]
        streams = [
            stack.enter_context(
                _echo_stream(
                    f"127.0.0.1:{stack.enter_context(_peer('echo.py', 'grpc', '127.0.0.1:0'))[-1]}", "Raw"
                )
            )
            for _ in range(WAVE_WORKERS)
        ]
        plain = PlainWave(
            [stack.enter_context(_plain_socket(f"{folder}/plain-{i}")) for i in range(WAVE_WORKERS)], hidden
        )
        frame = bytes(hidden.nbytes)
        sides: dict[str, Callable[[], Seconds]] = {
            "bare sockets": partial(_socket_waves, sockets, frame, repeats),
            "bare gRPC": partial(_stream_waves, streams, frame, repeats),
            "plain messages": partial(_median_s, plain.compute, repeats),
        }
        workers = stack.enter_context(_identity_workers(WAVE_WORKERS, WAVE_HIDDEN, WAVE_WORKERS))
        for name, kind in TRANSPORTS.items():
            layer = stack.enter_context(_layer_of(workers, kind, combine_sum=False))
            weights = torch.full(slots.shape, 1 / WAVE_WORKERS)
            compute = partial(layer.compute, hidden, slots, weights)
            layer.warm_up(compute)
            sides[name] = partial(_median_s, compute, repeats)
            one_worker = partial(layer.compute, hidden, slots[:, :1], weights[:, :1])
            sides[f"{name}, one worker"] = partial(_median_s, one_worker, repeats)
        turns = take_turns((Side(name, side) for name, side in sides.items()), rules, "wave")
    bare_us = 1e6 * turns.median("bare sockets", float)
    figures = [
        Figure("", "one wave of 8 KiB to 4 processes over bare unix sockets", bare_us, "us"),
        Figure(
            "",
            "the same wave of raw bytes over bare gRPC streams, over bare unix sockets",
            turns.ratio("bare gRPC", "bare sockets", float).value,
            "x",
        ),
        Figure(
            "",
            "the same wave of plain messages, checked and gathered, over bare unix sockets",
            turns.ratio("plain messages", "bare sockets", float).value,
            "x",
        ),
    ]
    for name in TRANSPORTS:
        title = f"one wave to 4 workers over bare unix sockets, {name}"
        figures += [
            Figure(
                "", f"one row to one worker, {name}", 1e6 * turns.median(f"{name}, one worker", float), "us"
            ),
            Figure("", f"one wave to 4 workers, {name}", 1e6 * turns.median(name, float), "us"),
            ratio_figure(JUDGED_WAVES.get(name, ""), title, turns, name, "bare sockets", float),
        ]
    return figures


@contextmanager
def _echo_socket(path: str, frame_bytes: int) -> Iterator[socket.socket]:
    with _peer("echo.py", "socket", path, str(frame_bytes)), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        yield connection


@contextmanager
def _plain_socket(path: str) -> Iterator[socket.socket]:
    with _peer("plain_wave.py", path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        yield connection


def _socket_waves(sockets: Sequence[socket.socket], frame: bytes, repeats: int) -> Seconds:
    answer = memoryview(bytearray(len(frame)))

    def wave() -> None:
        for one in sockets:
            one.sendall(frame)
        for one in sockets:
            read_frame(one, answer)

    return _median_s(wave, repeats)


def _stream_waves(streams: Sequence[_EchoStream], frame: bytes, repeats: int) -> Seconds:
    def wave() -> None:
        for one in streams:
            one.send(frame)
        for one in streams:
            one.receive()

    return _median_s(wave, repeats)


# A wide layer


def _layer(rules: Rules, quick: bool) -> list[Figure]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LAYER_ROWS, LAYER_HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(LAYER_ROWS, LAYER_SLOTS, generator=generator).softmax(-1)
    weights, slots = scores.topk(LAYER_TOP_K)
    with ExitStack() as stack:
        workers = stack.enter_context(_identity_workers(LAYER_WORKERS, LAYER_HIDDEN, LAYER_SLOTS))
        sides = {}
        for name, kind in TRANSPORTS.items():
            layer = stack.enter_context(_layer_of(workers, kind, combine_sum=True))
            compute = partial(layer.compute, hidden, slots, weights)
            layer.warm_up(compute)
            sides[name] = partial(_median_s, compute, 10 if quick else 150)
        turns = take_turns((Side(name, side) for name, side in sides.items()), rules, "layer call")
    return [
        median_figure(
            "layer-call-sum" if name == "gRPC" else "",
            f"layer call p50, 64 x 2048 bf16, top 8 of 128, 2 workers, sum, {name}",
            turns,
            name,
            lambda seconds: 1e3 * seconds,
            "ms",
        )
        for name in sides
    ]


class _Layer:
    """One layer of identity experts behind the product's own dispatcher and links."""

    def __init__(self, pool: ReplicaPool, epoch: Epoch, kind: TransportKind, *, combine_sum: bool) -> None:
        rules = DispatchRules(call_timeout_s=DEADLINE_S, combine_sum=combine_sum)
        self._pool, self._kind = pool, kind
        self._views = (ViewRows(ModelView.plain(epoch), 0, 0),)
        self._dispatcher = Dispatcher(pool, PhaseClock(), rules)

    def compute(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
        step = self._dispatcher.begin(self._views, deadline_s=time.monotonic() + DEADLINE_S)
        step.compute(0, hidden, slots, weights)
        if step.failed:
            raise SystemExit(f"a layer call failed: {next(iter(step.failed.values()))}")

    def warm_up(self, compute: Callable[[], None]) -> None:
        """Runs until the transport is open, and then for a while."""
        call_until_open(self._pool, self._kind, compute)
        for _ in range(WARM_UP_CALLS):
            compute()


@contextmanager
def _layer_of(workers: Sequence[Replica], kind: TransportKind, *, combine_sum: bool) -> Iterator[_Layer]:
    pool = pool_of(kind)
    pool.update(RoutingTable(1, tuple(workers)))
    epoch = Epoch.of("identity", dict(version for worker in workers for version in worker.holdings))
    try:
        yield _Layer(pool, epoch, kind, combine_sum=combine_sum)
    finally:
        pool.close()


# Processes and measuring


@contextmanager
def _identity_workers(num_workers: int, hidden: int, num_slots: int) -> Iterator[list[Replica]]:
    """Workers that share the slots evenly."""
    share = num_slots // num_workers
    with ExitStack() as stack:
        replicas = []
        for i in range(num_workers):
            name, slots = f"worker-{i}", range(i * share, (i + 1) * share)
            said = stack.enter_context(
                _peer("identity_worker.py", name, str(hidden), str(slots.start), str(slots.stop))
            )
            holdings = (ExpertVersion(ExpertAddress(0, slot), identity_version(slot)) for slot in slots)
            replicas.append(Replica(name, said[-1], f"{name}-1", frozenset(holdings)))
        yield replicas


@contextmanager
def _peer(program: str, *arguments: str) -> Iterator[list[str]]:
    """The words of the line `ready …` that a process prints; the process ends when its input does."""
    root = PEERS.parents[1]
    paths = os.pathsep.join((str(root), str(PEERS.parent)))
    process = subprocess.Popen(
        [sys.executable, str(PEERS / program), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        said = process.stdout.readline().split()
        if not said:
            raise SystemExit(f"{program} did not start")
        yield said
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _median_s(work: Callable[[], object], repeats: int) -> Seconds:
    """The median of single runs, the first tenth left out."""
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds[repeats // 10 :])


def _us(seconds: Seconds) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"


if __name__ == "__main__":
    typer.run(main)

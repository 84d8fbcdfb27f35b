"""Answers of workers at a router, over each of its transports."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from support.fuzzing import fuzzed
from support.mutations import bytes_near, message_near

from moesaic.errors import InvalidArgument, MoesaicError, to_status
from moesaic.transports import shared_memory
from moesaic.transports.grpc_connection import GrpcConnection, StreamOpened
from moesaic.transports.shared_memory import Frame
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_response, encode_response
from router.workers.transports.base import read_answer
from router.workers.transports.direct_stream import DirectStream
from router.workers.transports.shared_memory import SharedMemoryTransport

CALL_ID = 1
HIDDEN = torch.zeros(2, 4)
CALL = expert_pb2.ComputeRequest(
    call_id=CALL_ID, hidden=common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[2, 4])
)
CALL.experts.add(rows=[0, 1])
ROWS = expert_pb2.ComputeResponse(
    call_id=CALL_ID,
    epoch="e",
    versions=[bytes(32)],
    output=common_pb2.Tensor(
        dtype=common_pb2.DTYPE_INT8, shape=[2, 4], data=bytes(range(8)), scales=bytes(8)
    ),
    timing=expert_pb2.ComputeTiming(compute_us=3),
)
REFUSAL = expert_pb2.ComputeResponse(
    call_id=CALL_ID, epoch="e", error=to_status(InvalidArgument("m", field="f", retry_after_s=1.5))
)


@contextmanager
def relayed() -> Iterator[None]:
    """For what may raise an error of ours, or hand on the worker's own, which a client must be able to get."""
    try:
        yield
    except MoesaicError as error:
        assert error.message
        to_status(error)


def framed(raw: bytes) -> bytes:
    """As our workers write it, with the rows first."""
    answer = expert_pb2.ComputeResponse.FromString(raw)
    rows = answer.output.data
    if rows:
        answer.output.ClearField("data")
    return encode_response(Framed(answer, memoryview(rows)))


NEAR = message_near(ROWS) | message_near(REFUSAL)
ANSWERS = NEAR | NEAR.map(framed) | bytes_near(NEAR.map(framed))


@fuzzed("answers", ANSWERS, examples=150)
def test_an_answer_is_rows_or_an_error(raw: bytes) -> None:
    with relayed():
        answer = read_answer(decode_response(raw))
        assert answer.output.numel() * answer.output.element_size() == answer.data.nbytes
        assert answer.busy_us >= 0


def grpc_bytes(answer: bytes) -> bytes:
    """What a worker says on a connection on which it is asked once."""
    worker = GrpcConnection(client=False, max_message_bytes=1 << 20)
    caller = GrpcConnection(client=True, max_message_bytes=1 << 20)
    caller.open_stream(COMPUTE_METHOD, "worker")
    for event in worker.receive(caller.take_outgoing()):
        if isinstance(event, StreamOpened):
            worker.accept_stream(event.stream_id)
            worker.send(event.stream_id, answer)
    return worker.take_outgoing()


@fuzzed("direct_streams", bytes_near(ANSWERS.map(grpc_bytes)) | ANSWERS.map(grpc_bytes), examples=80)
def test_a_direct_stream_has_an_answer_or_breaks(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        theirs.sendall(raw)
        theirs.shutdown(socket.SHUT_WR)
        stream = DirectStream(ours, "worker")
        with relayed():
            stream.handshake(0)
        stream.send(CALL, HIDDEN)
        with relayed(), suppress(TimeoutError):
            stream.receive(CALL_ID, 0).output.sum()
        stream.close()
        assert stream.num_in_flight == 0


def frame_with(message: bytes) -> bytes:
    """A frame, and what the worker has written into the buffer."""
    return shared_memory.encode_frame(Frame(0, len(message), 8192, 8, 0)) + message


@fuzzed("shared_memory_answers", bytes_near(NEAR.map(frame_with)) | NEAR.map(frame_with), examples=80)
def test_shared_memory_has_an_answer_or_breaks(raw: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        transport = SharedMemoryTransport(ours)
        transport.send(CALL, HIDDEN)
        asked = shared_memory.receive_frame(theirs)
        assert asked is not None
        memory = shared_memory.open_buffer(asked[1] or -1)
        message = raw[shared_memory.FRAME_BYTES :][: memory.num_bytes]
        memory.bytes[: len(message)] = message
        theirs.send(raw[: shared_memory.FRAME_BYTES] or b"\0")
        with relayed(), suppress(TimeoutError):
            transport.receive(CALL_ID, 0).output.sum()
        transport.close()

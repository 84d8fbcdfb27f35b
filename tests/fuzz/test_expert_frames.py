"""Calls at a worker, as they come over each of its three transports, and beside them a caller who must not notice."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from support.expert_calls import compute_request, versions_of
from support.fuzzing import fuzzed, is_ours, refusals
from support.mutations import bytes_near, message_near
from support.tiny_worker import PlayedBatcher, tiny_worker

from expert_worker.compute.compute_pass import compute_calls
from expert_worker.serving.call_handler import AcceptedCall
from expert_worker.serving.direct_connection import DirectConnection
from expert_worker.serving.shared_memory import SharedMemoryConnection
from moesaic.errors import MoesaicError, from_status
from moesaic.transports import shared_memory
from moesaic.transports.grpc_connection import GrpcConnection, MessageReceived
from moesaic.transports.shared_memory import Frame
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_request, encode_request

HIDDEN = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BUFFER_BYTES = 8192
DATA_OFFSET = 2048


@cache
def valid_call() -> expert_pb2.ComputeRequest:
    versions = versions_of(tiny_worker().store)
    weights = {0: [0.5, 1.0], 2: [0.25, 2.0]}
    return compute_request(HIDDEN, {0: [0, 1], 2: [1, 2]}, versions, weights=weights, traceparent=TRACE)


def framed(call: expert_pb2.ComputeRequest) -> bytes:
    """As our routers write it, with the rows first."""
    head = expert_pb2.ComputeRequest()
    head.CopyFrom(call)
    head.hidden.ClearField("data")
    return encode_request(Framed(head, memoryview(call.hidden.data)))


def calls() -> st.SearchStrategy[bytes]:
    near = st.deferred(lambda: message_near(valid_call()))
    ours = near.map(lambda raw: framed(expert_pb2.ComputeRequest.FromString(raw)))
    return near | ours | bytes_near(ours)


@fuzzed("calls", calls(), examples=200)
def test_a_call_is_computed_or_refused(raw: bytes) -> None:
    handler = tiny_worker().handler
    with refusals():
        accepted = handler.accept(decode_request(raw))
        if isinstance(accepted, AcceptedCall):
            (output,) = compute_calls([accepted.call])
            if isinstance(output, MoesaicError):
                is_ours(output)
            else:
                assert output.shape[1] == HIDDEN.shape[1]
        else:
            is_ours(from_status(accepted.message.error))


def grpc_bytes(messages: list[bytes]) -> bytes:
    """A connection that opens a stream and sends these messages."""
    client = GrpcConnection(client=True, max_message_bytes=1 << 20)
    stream_id = client.open_stream(COMPUTE_METHOD, "worker")
    for message in messages:
        client.send(stream_id, message)
    return client.take_outgoing()


@fuzzed("direct_connections", bytes_near(st.lists(calls(), max_size=2).map(grpc_bytes)), examples=80)
def test_a_direct_connection_answers_or_ends_alone(raw: bytes) -> None:
    batcher = PlayedBatcher()
    with direct(batcher) as (caller, worker), direct(batcher) as (other, others_worker):
        caller.sendall(raw)
        caller.shutdown(socket.SHUT_WR)
        while not worker.closed:
            worker.read()
            batcher.compute()
        assert answers_over_grpc(other, others_worker, batcher)


@contextmanager
def direct(batcher: Any) -> Iterator[tuple[socket.socket, DirectConnection]]:
    caller, opened = socket.socketpair()
    opened.setblocking(False)
    connection = DirectConnection(opened, tiny_worker().handler, batcher, lambda _: None)
    connection.send_preface()
    with caller:
        yield caller, connection
        connection.close()


def answers_over_grpc(caller: socket.socket, worker: DirectConnection, batcher: PlayedBatcher) -> bool:
    client = GrpcConnection(client=True, max_message_bytes=1 << 20)
    stream_id = client.open_stream(COMPUTE_METHOD, "worker")
    client.send(stream_id, framed(valid_call()))
    caller.sendall(client.take_outgoing())
    worker.read()
    batcher.compute()
    answered = [event for event in client.receive(caller.recv(1 << 16)) if isinstance(event, MessageReceived)]
    return [expert_pb2.ComputeResponse.FromString(event.data).HasField("output") for event in answered] == [
        True
    ]


def in_memory(call: bytes, frame: Frame) -> bytes:
    """A frame, and the buffer that it speaks of: the message, then the rows."""
    request = expert_pb2.ComputeRequest.FromString(call)
    rows = request.hidden.data
    request.hidden.ClearField("data")
    content = request.SerializeToString()[:DATA_OFFSET].ljust(DATA_OFFSET, b"\0") + rows
    return shared_memory.encode_frame(frame) + content


def frames_near() -> st.SearchStrategy[bytes]:
    def of(call: expert_pb2.ComputeRequest) -> st.SearchStrategy[bytes]:
        rows = len(call.hidden.data)
        message_bytes = call.ByteSize() - rows - 3
        exact = Frame(0, message_bytes, DATA_OFFSET, rows, 0)
        whole = message_near(call).map(
            lambda raw: in_memory(raw, exact._replace(message_bytes=own_bytes(raw)))
        )
        return whole | bytes_near(whole)

    return st.deferred(lambda: of(valid_call()))


def own_bytes(raw: bytes) -> int:
    """The length of a call without its rows."""
    request = expert_pb2.ComputeRequest.FromString(raw)
    request.hidden.ClearField("data")
    return request.ByteSize()


@fuzzed("shared_memory_connections", frames_near(), examples=120)
def test_a_shared_memory_connection_answers_or_ends_alone(raw: bytes) -> None:
    batcher = PlayedBatcher()
    valid = in_memory(
        valid_call().SerializeToString(),
        Frame(0, own_bytes(valid_call().SerializeToString()), DATA_OFFSET, len(valid_call().hidden.data), 0),
    )
    with mapped(batcher) as (caller, worker), mapped(batcher) as (other, others_worker):
        offer(caller, raw)
        # The same place again, which is in use or free by then.
        with suppress(OSError):
            caller.send(raw[: shared_memory.FRAME_BYTES])
        worker.read()
        batcher.compute()
        offer(other, valid)
        others_worker.read()
        batcher.compute()
        other.recv(shared_memory.HANDSHAKE_BYTES)
        assert len(other.recv(shared_memory.HANDSHAKE_BYTES)) == shared_memory.FRAME_BYTES


@contextmanager
def mapped(batcher: Any) -> Iterator[tuple[socket.socket, SharedMemoryConnection]]:
    caller, opened = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = SharedMemoryConnection(opened, tiny_worker().handler, batcher, lambda _: None)
    connection.send_handshake("i")
    with caller:
        yield caller, connection
        connection.close()


def offer(caller: socket.socket, raw: bytes) -> None:
    """Sends a frame with a new buffer, which holds what follows it."""
    buffer, fd = shared_memory.make_buffer(BUFFER_BYTES)
    frame, content = raw[: shared_memory.FRAME_BYTES], raw[shared_memory.FRAME_BYTES :][:BUFFER_BYTES]
    buffer.bytes[: len(content)] = content
    if frame:
        caller.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))])
    os.close(fd)

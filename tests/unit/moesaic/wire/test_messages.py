"""Messages of the data plane: plain protobuf to others, whoever wrote them and in whatever order."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import DataLoss, InvalidArgument
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.messages import (
    Framed,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

U32 = st.integers(0, 2**32 - 1)
HEADERS = st.builds(
    common_pb2.Tensor,
    dtype=st.sampled_from(common_pb2.Dtype.values()),
    shape=st.lists(U32, max_size=3),
    scales=st.binary(max_size=20),
)
EXPERT_ROWS = st.builds(
    expert_pb2.ExpertRows,
    slot=U32,
    version=st.binary(max_size=32),
    rows=st.lists(U32, max_size=5),
    weights=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
)
REQUESTS = st.builds(
    expert_pb2.ComputeRequest,
    call_id=st.integers(0, 2**64 - 1),
    epoch=st.text(max_size=20),
    layer=U32,
    hidden=st.none() | HEADERS,
    experts=st.lists(EXPERT_ROWS, max_size=3),
    combine=st.sampled_from(expert_pb2.Combine.values()),
    timeout_ms=U32,
    traceparent=st.text(max_size=20),
)
RESPONSES = st.builds(
    expert_pb2.ComputeResponse,
    call_id=st.integers(0, 2**64 - 1),
    epoch=st.text(max_size=20),
    versions=st.lists(st.binary(max_size=32), max_size=3),
    output=st.none() | HEADERS,
    timing=st.none() | st.builds(expert_pb2.ComputeTiming, decode_us=U32, queue_us=U32),
)
DATA = st.binary(max_size=300) | st.sampled_from([bytes(127), bytes(128), bytes(2_500)])


@given(REQUESTS, DATA)
def test_protobuf_reads_a_request_that_we_wrote(message: expert_pb2.ComputeRequest, data: bytes) -> None:
    read = expert_pb2.ComputeRequest.FromString(encode_request(Framed(message, memoryview(data))))
    if data:
        message.hidden.data = data
    assert read == message


@given(RESPONSES, DATA)
def test_protobuf_reads_a_response_that_we_wrote(message: expert_pb2.ComputeResponse, data: bytes) -> None:
    read = expert_pb2.ComputeResponse.FromString(encode_response(Framed(message, memoryview(data))))
    if data:
        message.output.data = data
    assert read == message


@given(REQUESTS, DATA)
def test_we_read_a_request_as_protobuf_does_whoever_wrote_it(
    message: expert_pb2.ComputeRequest, data: bytes
) -> None:
    ours = encode_request(Framed(message, memoryview(data)))
    if data:
        message.hidden.data = data
    for raw in (ours, message.SerializeToString()):
        check_request(raw)


@given(RESPONSES, DATA)
def test_we_read_a_response_as_protobuf_does_whoever_wrote_it(
    message: expert_pb2.ComputeResponse, data: bytes
) -> None:
    ours = encode_response(Framed(message, memoryview(data)))
    if data:
        message.output.data = data
    for raw in (ours, message.SerializeToString()):
        check_response(raw)


@given(st.lists(st.tuples(REQUESTS, DATA, st.booleans()), min_size=2, max_size=3))
def test_messages_written_one_behind_the_other_are_read_as_protobuf_merges_them(
    parts: list[tuple[expert_pb2.ComputeRequest, bytes, bool]],
) -> None:
    raw = b""
    for message, data, plain in parts:
        if plain and data:
            message.hidden.data = data
        raw += message.SerializeToString() if plain else encode_request(Framed(message, memoryview(data)))
    check_request(raw)


@pytest.mark.parametrize(
    "tail", [b"\x22\x02\x1a\x00", b"\xa2\x00\x02\x1a\x00", b"\x22\x04\x1a\x02xy", b"\x25abcd"]
)
def test_what_stands_behind_the_data_counts_as_for_protobuf(tail: bytes) -> None:
    message = expert_pb2.ComputeRequest(hidden=common_pb2.Tensor(shape=[2, 3]))
    check_request(encode_request(Framed(message, memoryview(b"twelve bytes"))) + tail)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    for prefix in (b"", b"\x22", b"\x22\x88\x80\x80\x80\x00\x1a\x82\x80\x80\x80\x00"):
        with contextlib.suppress(InvalidArgument):
            decode_request(prefix + raw)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_response_or_refused(raw: bytes) -> None:
    for prefix in (b"", b"\x2a", b"\x2a\x88\x80\x80\x80\x00\x1a\x82\x80\x80\x80\x00"):
        with contextlib.suppress(DataLoss):
            decode_response(prefix + raw)


@given(REQUESTS, DATA, st.data())
def test_a_request_that_was_damaged_is_read_as_protobuf_does_or_refused(
    message: expert_pb2.ComputeRequest, data: bytes, draw: st.DataObject
) -> None:
    raw = bytearray(encode_request(Framed(message, memoryview(data))))
    for _ in range(min(3, len(raw))):
        raw[draw.draw(st.integers(0, min(len(raw), 60) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidArgument):
        check_request(bytes(raw[: draw.draw(st.integers(0, len(raw)))]))


def test_the_data_are_a_view_of_what_came_at_an_aligned_place() -> None:
    message = expert_pb2.ComputeResponse(output=common_pb2.Tensor(shape=[1]))
    raw = encode_response(Framed(message, memoryview(b"data")))
    data = decode_response(raw).data
    assert data.obj is raw
    assert raw.index(b"data") % 4 == 0


def check_request(raw: bytes) -> None:
    """Ours must be what protobuf reads; where protobuf refuses, so must we."""
    framed = decode_request(raw)
    plain = expert_pb2.ComputeRequest.FromString(raw)
    assert bytes(framed.data) == plain.hidden.data
    if plain.hidden.data:
        plain.hidden.ClearField("data")
    # As bytes: NaN is nothing's equal.
    assert framed.message.SerializeToString() == plain.SerializeToString()


def check_response(raw: bytes) -> None:
    framed = decode_response(raw)
    plain = expert_pb2.ComputeResponse.FromString(raw)
    assert bytes(framed.data) == plain.output.data
    if plain.output.data:
        plain.output.ClearField("data")
    # As bytes: NaN is nothing's equal.
    assert framed.message.SerializeToString() == plain.SerializeToString()

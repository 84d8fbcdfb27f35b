"""Errors, as they are told to whoever caused them."""

from __future__ import annotations

import grpc
from google.rpc import status_pb2

from moesaic.errors import InvalidArgument, MoesaicError, Unavailable, from_status, to_status


def test_an_error_about_half_a_surrogate_pair_can_be_told() -> None:
    told = from_status(to_status(InvalidArgument("\ud800: occurs twice", field="a\udfff")))
    assert (told.message, told.field) == ("\\ud800: occurs twice", "a\\udfff")


def test_a_status_without_a_message_is_told_by_its_code() -> None:
    error = from_status(status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0]))
    assert isinstance(error, Unavailable)
    assert error.message == "unavailable"
    assert from_status(status_pb2.Status(code=99)).message == "unknown"
    assert type(from_status(status_pb2.Status(code=99))) is MoesaicError

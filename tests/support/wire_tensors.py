"""Whole tensors as one message, for tests that speak plain protobuf; the product keeps the bytes beside the message."""

from __future__ import annotations

import torch

from moesaic.v1 import common_pb2
from moesaic.wire.tensors import WIRE_DTYPES, data_of, encode_rows, view_rows


def to_wire(tensor: torch.Tensor) -> common_pb2.Tensor:
    header, rows = encode_rows(tensor, WIRE_DTYPES[tensor.dtype])
    header.data = bytes(data_of(rows))
    return header


def from_wire(message: common_pb2.Tensor) -> torch.Tensor:
    return view_rows(message, memoryview(message.data))

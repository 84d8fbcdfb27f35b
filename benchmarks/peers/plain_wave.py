"""A wave in as few lines as possible: only the messages of the data plane, over unix sockets.

Either end is one plain function: protobuf, the checks that are indispensable, and the torch operations that
the rows need. The cost of such a wave is the cost of protobuf, torch and the interpreter, without a server.

It prints `ready` and runs until its caller disconnects.

Run by transport.py: python benchmarks/peers/plain_wave.py PATH
"""

from __future__ import annotations

import math
import socket
import sys
import warnings
from collections.abc import Sequence

import torch

from moesaic.v1 import common_pb2, expert_pb2

FRAME_BYTES = 1 << 17
EPOCH = "0123456789abcdef"


def version(slot: int) -> bytes:
    return bytes((slot,)) * 32


def serve(path: str) -> None:
    """Returns the rows of each call to one caller."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        print("ready", flush=True)
        connection, _ = listener.accept()
    with connection:
        while frame := connection.recv(FRAME_BYTES):
            connection.send(_answer(frame))


def _answer(frame: bytes) -> bytes:
    head, data = _split(frame)
    request = expert_pb2.ComputeRequest.FromString(head)
    rows = [row for group in request.experts for row in group.rows]
    versions = [group.version for group in request.experts]
    if versions != [version(group.slot) for group in request.experts]:
        raise SystemExit("another version")
    hidden = torch.frombuffer(data, dtype=torch.float32).view(tuple(request.hidden.shape))
    if not math.isfinite(hidden.sum().item()):
        raise SystemExit("not finite")
    output = hidden.index_select(0, torch.tensor(rows))
    response = expert_pb2.ComputeResponse(
        call_id=request.call_id,
        epoch=request.epoch,
        versions=versions,
        output=common_pb2.Tensor(dtype=request.hidden.dtype, shape=output.shape),
    )
    return _join(response.SerializeToString(), output)


class PlainWave:
    """A wave of one token to one expert on each of several such processes."""

    def __init__(self, connections: Sequence[socket.socket], hidden: torch.Tensor) -> None:
        """`hidden` is [1, D] in float32."""
        self._connections = connections
        self._hidden = hidden
        self._weights = torch.full((1, len(connections)), 1 / len(connections))

    def compute(self) -> torch.Tensor:
        """Sends all calls, then reads all answers; returns [1, D]."""
        for slot, connection in enumerate(self._connections):
            request = expert_pb2.ComputeRequest(
                call_id=slot,
                epoch=EPOCH,
                hidden=common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=self._hidden.shape),
                experts=[expert_pb2.ExpertRows(slot=slot, version=version(slot), rows=[0])],
                combine=expert_pb2.COMBINE_ROWS,
                timeout_ms=30_000,
            )
            connection.send(_join(request.SerializeToString(), self._hidden))
        rows = torch.empty(len(self._connections), self._hidden.shape[1])
        for slot, connection in enumerate(self._connections):
            head, data = _split(connection.recv(FRAME_BYTES))
            response = expert_pb2.ComputeResponse.FromString(head)
            if response.epoch != EPOCH or list(response.versions) != [version(slot)]:
                raise SystemExit("another version")
            rows[slot] = torch.frombuffer(data, dtype=torch.float32)
        total = rows[:1] * self._weights[:, :1]
        for slot in range(1, len(rows)):
            total += rows[slot] * self._weights[:, slot]
        return total


def _join(head: bytes, rows: torch.Tensor) -> bytes:
    return b"".join((len(head).to_bytes(4, "little"), head, rows.numpy().data.cast("B")))


def _split(frame: bytes) -> tuple[memoryview, memoryview]:
    """The message of a frame, and the bytes of its rows."""
    view = memoryview(frame)
    end = 4 + int.from_bytes(view[:4], "little")
    return view[4:end], view[end:]


if __name__ == "__main__":
    # The buffers of received frames are only read.
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    torch.set_num_threads(1)
    serve(sys.argv[1])

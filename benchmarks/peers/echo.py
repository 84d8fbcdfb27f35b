"""Processes that send back what they receive, over a unix socket or a gRPC stream in three encodings.

Prints `ready` (and the port of a TCP server) and runs until its standard input ends.

Run by transport.py: python benchmarks/peers/echo.py socket PATH BYTES | grpc ADDRESS
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed, decode_request, encode_response

UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def echo_frames(path: str, frame_bytes: int) -> None:
    """Echoes frames of one size over a unix socket to one caller."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("ready", flush=True)
        connection, _ = listener.accept()
    frame = memoryview(bytearray(frame_bytes))
    with connection:
        while read_frame(connection, frame):
            connection.sendall(frame)


def read_frame(connection: socket.socket, frame: memoryview) -> bool:
    """Fills the frame; False at the end of the stream."""
    filled = 0
    while filled < len(frame):
        received = connection.recv_into(frame[filled:])
        if not received:
            return False
        filled += received
    return True


def echo_raw(raw: bytes) -> bytes:
    return raw


def echo_plain(raw: bytes) -> bytes:
    request = expert_pb2.ComputeRequest.FromString(raw)
    response = expert_pb2.ComputeResponse(call_id=request.call_id, epoch=request.epoch, output=request.hidden)
    return response.SerializeToString()


def echo_ours(raw: bytes) -> bytes:
    framed = decode_request(raw)
    request = framed.message
    response = expert_pb2.ComputeResponse(call_id=request.call_id, epoch=request.epoch, output=request.hidden)
    return encode_response(Framed(response, framed.data))


async def serve_grpc(address: str) -> None:
    """Serves the streams Raw, Plain and Ours at HOST:PORT or unix:PATH."""
    server = grpc.aio.server(options=UNLIMITED)

    def handler(echo: Any) -> Any:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for raw in requests:
                yield echo(raw)

        return grpc.stream_stream_rpc_method_handler(answer)

    methods = {"Raw": handler(echo_raw), "Plain": handler(echo_plain), "Ours": handler(echo_ours)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", methods),))
    port = server.add_insecure_port(address)
    await server.start()
    print(f"ready {port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0.5)


if __name__ == "__main__":
    if sys.argv[1] == "socket":
        echo_frames(str(Path(sys.argv[2])), int(sys.argv[3]))
    else:
        asyncio.run(serve_grpc(sys.argv[2]))

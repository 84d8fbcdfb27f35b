"""Asks a worker, once, which transports it offers beside the grpcio stream, and opens them."""

from __future__ import annotations

from contextlib import suppress

import grpc

from moesaic.errors import MoesaicError
from moesaic.routing_table import Replica
from moesaic.transports.shared_memory import VERSION, SharedMemoryError, host_id
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports import direct_stream, shared_memory
from router.workers.transports.base import DIRECT, SHARED_MEMORY, Transport, TransportKind

# A worker that is computing accepts connections between two passes.
ASK_TIMEOUT_S = 10.0


def open_transports(
    stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica, *, use_shared_memory: bool, use_direct: bool
) -> dict[TransportKind, Transport]:
    """The transports that could be opened to exactly that incarnation of a worker; empty where there are
    none. May wait for seconds, but no longer: a host whose firewall drops packets looks the same as a slow
    one."""
    request = expert_pb2.OpenTransportsRequest(
        host_id=host_id() if use_shared_memory else "", shared_memory_version=VERSION
    )
    try:
        offered = stub.OpenTransports(request, timeout=ASK_TIMEOUT_S)
    except grpc.RpcError:  # the worker is stopping, or is older than this RPC
        return {}
    opened: dict[TransportKind, Transport] = {}
    if offered.incarnation != replica.incarnation:
        return opened
    if use_direct and offered.direct_port:
        with suppress(OSError, MoesaicError):
            opened[DIRECT] = direct_stream.connect(replica.address, offered.direct_port)
    if use_shared_memory and offered.socket_path:
        with suppress(OSError, SharedMemoryError):
            opened[SHARED_MEMORY] = shared_memory.connect(offered.socket_path, replica.incarnation)
    return opened

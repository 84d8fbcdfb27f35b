"""The ways to a worker beside gRPC's own: asked for once, and opened where there are any."""

from __future__ import annotations

from contextlib import suppress

import grpc

from moesaic.errors import MoesaicError
from moesaic.routing_table import Replica
from moesaic.transports import shared_memory as lane
from moesaic.transports.shared_memory import LaneError
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports import direct_stream
from router.workers.transports import shared_memory as lane_link
from router.workers.transports.base import DIRECT, LANE, Transport, Way

# A worker that computes lets callers in between two passes.
ASK_TIMEOUT_S = 10.0


def open_ways(
    stub: expert_pb2_grpc.ExpertServiceStub, replica: Replica, *, use_lane: bool, use_direct: bool
) -> dict[Way, Transport]:
    """The open ways to just that incarnation of a worker, none where there are none. Waits for the worker, for seconds
    at most: a host that does not let us through must not be told from one that is slow."""
    host_id = lane.host_id() if use_lane else ""
    request = expert_pb2.OpenLaneRequest(host_id=host_id, lane_version=lane.LANE_VERSION)
    try:
        opened = stub.OpenLane(request, timeout=ASK_TIMEOUT_S)
    except grpc.RpcError:  # a worker that is busy with its end, or older than all other ways
        return {}
    ways: dict[Way, Transport] = {}
    if opened.incarnation != replica.incarnation:
        return ways
    if use_direct and opened.compute_port:
        with suppress(OSError, MoesaicError):
            ways[DIRECT] = direct_stream.connect(replica.address, opened.compute_port)
    if use_lane and opened.socket_path:
        with suppress(OSError, LaneError):
            ways[LANE] = lane_link.connect(opened.socket_path, replica.incarnation)
    return ways

"""The fixed order of the transports. Pure: the same call over the same open transports takes the same one."""

from __future__ import annotations

from collections.abc import Container

from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind


def choose(opened: Container[TransportKind], *, fits_direct: bool) -> TransportKind:
    """The transport of a call. `opened` holds those that are open beside the grpcio stream, which carries
    every call; `fits_direct` says whether the call is small enough for the direct stream."""
    if SHARED_MEMORY in opened:
        return SHARED_MEMORY
    if DIRECT in opened and fits_direct:
        return DIRECT
    return GRPC

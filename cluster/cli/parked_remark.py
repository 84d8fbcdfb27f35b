"""Sequences that wait for a missing expert, as remarks for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moesaic.v1 import inference_pb2


def tell_parked(routers: Mapping[str, inference_pb2.GetRouterStatsResponse]) -> Iterator[str]:
    """A sentence for each router that has some."""
    for name, stats in routers.items():
        if number := stats.parked_sequences:
            wait = "1 sequence waits" if number == 1 else f"{number} sequences wait"
            yield f"{wait} for a missing expert at {name}"

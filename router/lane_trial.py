"""Which of two ways a call takes, the stream or the lane: real calls try both in turn, then the faster one stays."""

from __future__ import annotations

from router.lane_link import choose_lane

# Calls that each way gets: the first few open buffers and fill caches, the rest are compared.
WARM_UP_CALLS = 4
COMPARED_CALLS = 16


class LaneTrial:
    """Belongs to the thread that sends and receives."""

    def __init__(self) -> None:
        # None until the trial is over.
        self._chosen: bool | None = None
        self._over_grpc: list[float] = []
        self._over_lane: list[float] = []

    def takes_lane(self, call_id: int) -> bool:
        """During the trial the ways change after two calls, so that each of two micro-batches goes both."""
        return bool(call_id >> 1 & 1) if self._chosen is None else self._chosen

    def observe(self, over_lane: bool, overhead_s: float) -> None:
        """Takes what a call waited beyond the worker's own work."""
        if self._chosen is not None:
            return
        (self._over_lane if over_lane else self._over_grpc).append(overhead_s)
        if min(len(self._over_grpc), len(self._over_lane)) >= WARM_UP_CALLS + COMPARED_CALLS:
            self._chosen = choose_lane(self._over_grpc[WARM_UP_CALLS:], self._over_lane[WARM_UP_CALLS:])

"""The real computing of a worker, held up at will."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from expert_worker.compute.call import ExpertCall
from expert_worker.compute.compute_pass import compute_calls
from moesaic.errors import MoesaicError

WAIT_S = 60.0


class Gate:
    """What a batcher computes with; passes wait while it is closed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        # How many calls each pass joined.
        self.passes: list[int] = []

    def __call__(self, calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
        self.entered.set()
        self.passes.append(len(calls))
        assert self.open.wait(WAIT_S)
        return compute_calls(calls)

    def close(self) -> None:
        """The next pass enters and waits."""
        self.open.clear()
        self.entered.clear()

    def close_behind(self, send: Callable[[], object]) -> None:
        """`send` sends a call, which then occupies the compute thread."""
        self.close()
        send()
        assert self.entered.wait(WAIT_S)

"""Signals to processes that may have ended meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(pids: Iterable[int]) -> None:
    send(signal.SIGSTOP, pids)


def go_on(pids: Iterable[int]) -> None:
    send(signal.SIGCONT, pids)

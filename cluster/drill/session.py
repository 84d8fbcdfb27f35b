"""The processes of a session: what a program has started, whatever has become of its parents."""

from __future__ import annotations

import contextlib
import os

import psutil


def members(session: int) -> list[psutil.Process]:
    """Those that are alive. The session is asked for before anything else of a process, which would take far longer."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(pid) == session and is_alive(process := psutil.Process(pid)):
                found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

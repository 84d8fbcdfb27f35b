"""Threads that load experts. Each computes alone, without torch's helper threads, which would compete with each other.

torch keeps its number of threads for the calling thread, and for all threads that start later. Loading threads are
therefore started before anything is served: afterwards no switch of the process is touched.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Linux has a niceness per thread. At this one a thread gets about a tenth of a core that another thread wants.
_LOW_PRIORITY = 10


def start_load_threads(count: int, *, low_priority: bool = False) -> ThreadPoolExecutor:
    """Started threads, at a low priority where they load beside others that compute."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        if low_priority:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
        ready.wait()

    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="expert-load", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    # The threads that start later are not meant.
    torch.set_num_threads(num_threads)
    return pool

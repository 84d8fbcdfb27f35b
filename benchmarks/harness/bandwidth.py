"""The memory bandwidth: bytes per second when weights are read once, with a number of threads.

It is measured in a process of its own: python benchmarks/harness/bandwidth.py THREADS
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROWS, COLUMNS = 1 << 15, 1 << 13  # 1 GiB of float32, more than any cache holds
REPEATS = 7


def measure_bandwidth(threads: int) -> float:
    """Bytes per second, measured in a fresh process, so that none of its threads stays in this one."""
    command = [sys.executable, str(Path(__file__)), str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def _main(threads: int) -> None:
    torch.set_num_threads(threads)
    matrix, vector = torch.ones(ROWS, COLUMNS), torch.ones(COLUMNS)
    # The faster way of reading is the one to compare with.
    print(max(_rate(matrix, matrix.sum), _rate(matrix, lambda: torch.mv(matrix, vector))))


def _rate(matrix: torch.Tensor, read: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(seconds)


if __name__ == "__main__":
    _main(int(sys.argv[1]))

"""What the C allocator does with large blocks that are freed. Weights and the buffers of a pass want opposite things.

While weights load, every one is mapped by itself and what it was made from goes back to the system: nothing is left in
between. While passes run, their buffers stay with the process: given back, each page of them is faulted in again by the
next pass, which costs more than the arithmetic around the products. Elsewhere than on glibc this does nothing.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_WEIGHT_BYTES = 128 << 10
# The largest that glibc takes.
_BUFFER_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20


def return_freed_memory() -> None:
    """For the time in which weights load."""
    _mallopt(_M_MMAP_THRESHOLD, _WEIGHT_BYTES)


def keep_freed_memory() -> None:
    """For the time in which passes run."""
    _mallopt(_M_MMAP_THRESHOLD, _BUFFER_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)

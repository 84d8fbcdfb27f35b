"""How the C allocator treats freed blocks: loading weights and computing passes need opposite settings.

While weights load, each large block is mapped by itself, so that the memory that weights were made from goes
back to the system and leaves no holes between them. While passes run, freed buffers stay with the process:
otherwise the next pass would fault in every page again, which costs more than the arithmetic around the
products. Neither changes while the worker serves: what an expert leaves that is unloaded then is given back by
`trim`. Without glibc these functions do nothing.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_WEIGHT_BYTES = 128 << 10
# The largest threshold that glibc accepts.
_BUFFER_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20


def return_freed_memory() -> None:
    """To be called before weights load."""
    _mallopt(_M_MMAP_THRESHOLD, _WEIGHT_BYTES)


def keep_freed_memory() -> None:
    """To be called before passes run."""
    _mallopt(_M_MMAP_THRESHOLD, _BUFFER_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def trim() -> None:
    """Gives the pages of freed blocks back to the system; to be called after weights were freed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)

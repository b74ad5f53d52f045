"""What is left behind by loading: freed memory goes back to the system, and what stays is not looked through again."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache


def trim_heap() -> None:
    """Give back what has been freed, in some tens of milliseconds; does nothing where there is no glibc.

    Loading an encoder and warming it up take hundreds of MiB that serving it does not. glibc would keep them: what it
    gives back by itself is the top of each heap only, and something small is always above.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def keep_from_collector() -> None:
    """Leave all that there is now out of the collector's passes, in which nothing is answered.

    With torch and open_clip imported a full pass takes a quarter of a second. What is left out is freed all the same
    when nobody refers to it; only what refers to itself would stay.
    """
    gc.freeze()


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; a system that has none to open
        return None
    found.argtypes = [ctypes.c_size_t]
    found.restype = ctypes.c_int
    return found

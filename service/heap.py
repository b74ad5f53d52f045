"""Freed memory that the C library keeps for later, given back to the system when there will be no such later soon."""

from __future__ import annotations

import ctypes
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


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; a system that has none to open
        return None
    found.argtypes = [ctypes.c_size_t]
    found.restype = ctypes.c_int
    return found

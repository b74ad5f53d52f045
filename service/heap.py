"""glibc's heaps and Python's collector: threads share heaps, what loading frees goes back, what stays is left alone."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache

from ironclip.resources import usable_cpus
from service.environment import heaps_are_limited

# By malloc.h.
_M_ARENA_MAX = -8
_HEAPS = 2


def share_heaps() -> None:
    """Have threads share heaps, one a core, two at least; call before they are started.

    glibc gives each thread one of its own, up to eight a core, and each keeps what its thread needed once.
    `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` in the environment win.
    """
    set_option = _glibc("mallopt", ctypes.c_int, ctypes.c_int)
    if set_option is not None and not heaps_are_limited():
        set_option(_M_ARENA_MAX, max(_HEAPS, usable_cpus()))


def trim_heap() -> None:
    """Give back what has been freed, in some tens of milliseconds; does nothing where there is no glibc.

    Loading an encoder and warming it up take hundreds of MiB that serving it does not. glibc would keep them: what it
    gives back by itself is the top of each heap only, and something small is always above.
    """
    trim = _glibc("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


def keep_from_collector() -> None:
    """Leave all that there is now out of the collector's passes, in which nothing is answered.

    With torch and open_clip imported a full pass takes a quarter of a second. What is left out is freed all the same
    when nobody refers to it; only what refers to itself would stay.
    """
    gc.freeze()


@cache
def _glibc(name: str, *arguments: type) -> Callable[..., int] | None:
    try:
        found = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library; a system that has none to open
        return None
    found.argtypes = arguments
    found.restype = ctypes.c_int
    function: Callable[..., int] = found
    return function

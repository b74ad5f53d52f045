"""What a tower runs before it is served: what has to be set up is, and its pace is known."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.pace import Pace

# Seconds after which one measurement of a size is enough, and that a CPU's batch may take to be measured at all.
_LONG = 0.25
_TOO_LONG = 1.0
# A CPU's batches follow a line: one picture, enough for the cores to be full, and, where that is soon done, all.
_CPU_SIZES = (1, 8)


def batch_sizes(most: int) -> list[int]:
    """The powers of two, and the largest batch itself: what a GPU is warmed in and fixed forwards are made for."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def warm(pace: Pace, most: int, run: Callable[[int], object], *, on_cpu: bool) -> None:
    """Run batches of up to ``most``, and tell the pace how long they take; the first of a size also sets things up.

    A GPU has kernels to choose and memory to set aside for each size. A CPU has not: there a few sizes say what the
    others take, and one that would hold up the start is left to its first use.

    Args:
        pace: is told.
        most: items in a batch.
        run: a batch of so many items, done when it returns.
        on_cpu: whether a CPU runs it.
    """
    for size in sorted({*_CPU_SIZES, most}) if on_cpu else batch_sizes(most):
        if size > most or (on_cpu and pace.seconds(size) > _TOO_LONG):
            return
        for _ in range(2):
            began = time.perf_counter()
            run(size)
            seconds = time.perf_counter() - began
            pace.measured(size, seconds)
            if seconds > _LONG:
                break

"""Which of those who wait to begin with, when not all can be in time: early drop (Shen et al. 2019, Nexus).

Whoever has little time left keeps a batch small, and small batches make more of the others late. Nothing here knows
what waits, or a clock: only costs, and the seconds that each has left.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

# So many of the entries to begin with are tried at most.
_STARTS = 16


class Schedule:
    """What comes of serving entries in the order of their deadlines, each batch cut by the first deadline in it.

    Args:
        costs: items of each entry.
        slack: seconds that each has left, ascending.
        most: items in a batch.
        seconds: how long a batch of so many items takes.
    """

    def __init__(
        self, costs: Sequence[int], slack: Sequence[float], most: int, seconds: Callable[[int], float]
    ) -> None:
        self._slack = slack
        # One that is larger than a batch is a batch of its own.
        self._sums = [0, *accumulate(min(cost, most) for cost in costs)]
        self._takes = [0.0, *(seconds(items) for items in range(1, min(most, self._sums[-1]) + 1))]

    def _end(self, start: int, now: float) -> int:
        """Up to where a batch goes that begins with ``start`` in ``now`` seconds; ``start`` itself if that is late."""
        fits = bisect.bisect_right(self._takes, self._slack[start] - now) - 1
        return max(start, bisect.bisect_right(self._sums, self._sums[start] + fits) - 1)

    def _batch(self, start: int, end: int) -> float:
        return self._takes[self._sums[end] - self._sums[start]]

    def best_start(self) -> int:
        """Which entry to begin with: the fewest are late then, and of equal ones its batch does most in a second."""
        if not (fewest := self.late(0)):
            return 0
        best, rate, count = 0, self.rate(0), len(self._slack)
        for at in range(0, count, -(-count // _STARTS)):
            late = self.late(at, fewest)
            if late < fewest or (late == fewest and self.rate(at) > rate):
                best, fewest, rate = at, late, self.rate(at)
        return best

    def late(self, start: int, most: float = math.inf) -> int:
        """How many are late, when those before ``start`` are given up; counted until there are more than ``most``."""
        late, now, at = start, 0.0, start
        while at < len(self._slack) and late <= most:
            end = self._end(at, now)
            if end == at:
                after = max(at + 1, bisect.bisect_left(self._slack, now + self._takes[1]))
                late, at = late + after - at, after
            else:
                now, at = now + self._batch(at, end), end
        return late

    def rate(self, start: int) -> float:
        """Entries a second of the batch that begins with ``start``."""
        end = self._end(start, 0.0)
        return (end - start) / self._batch(start, end) if end > start else 0.0

    def first_seconds(self, start: int) -> float:
        """How long the batch takes that begins with ``start``."""
        return self._batch(start, self._end(start, 0.0))

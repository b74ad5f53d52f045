"""How long work will take: the shape is measured at start, how fast the machine is now with every batch."""

from __future__ import annotations

import bisect
import math

# Weight of the newest batch in the running (geometric) mean, and how far one batch may move it.
_NEWEST = 0.2
_MOST = 10.0
# What is kept in hand where a deadline is to be met: so many mean deviations of the last batches, and how much at least
# and at most. With errors as a normal distribution has them, nine batches of ten are over sooner.
_DEVIATIONS = 1.6
_LEAST_SURE, _MOST_SURE = 1.1, 3.0


class Pace:
    """Seconds that items take in batches.

    A batch of one costs far more an item than a full one, so one rate for both would call a quiet service slow when a
    burst begins. The time of each batch size is measured once (`measured`); what varies afterwards (a busy machine,
    a throttled device) is one factor for all sizes (`observe`). Without measurements the time grows with the items.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: list[float] = []
        self._factor = 1.0
        self._known = False
        self._deviation = 0.0  # mean of how far batches are from the estimate, as a logarithm

    def measured(self, items: int, seconds: float) -> None:
        """Enter what a batch of ``items`` took at start; the quickest counts."""
        at = bisect.bisect_left(self._sizes, items)
        if at < len(self._sizes) and self._sizes[at] == items:
            self._seconds[at] = min(self._seconds[at], seconds)
        else:
            self._sizes.insert(at, items)
            self._seconds.insert(at, seconds)
        self._known = True

    def observe(self, items: int, seconds: float) -> None:
        """Enter what a batch took in service."""
        if seconds <= 0 or items < 1:
            return
        ratio = seconds / self._shape(items)
        if not self._known:
            self._factor, self._known = ratio, True
            return
        ratio = min(max(ratio, self._factor / _MOST), self._factor * _MOST)
        self._deviation += _NEWEST * (abs(math.log(ratio / self._factor)) - self._deviation)
        self._factor *= (ratio / self._factor) ** _NEWEST

    def seconds(self, items: int) -> float:
        """Estimated seconds of ``items`` in batches as large as were measured; 0 before anything is known."""
        return self._factor * self._shape(items) if self._known and items > 0 else 0.0

    def surely(self, items: int) -> float:
        """Seconds that few such batches exceed, by how far the last ones were from their estimates."""
        return min(max(math.exp(_DEVIATIONS * self._deviation), _LEAST_SURE), _MOST_SURE) * self.seconds(items)

    def _shape(self, items: int) -> float:
        if not self._sizes:
            return float(items)
        largest = self._sizes[-1]
        full, rest = divmod(items, largest)
        return full * self._seconds[-1] + (self._between(rest) if rest else 0.0)

    def _between(self, items: int) -> float:
        """The time of a batch no larger than the largest: on the line between its neighbours."""
        at = bisect.bisect_left(self._sizes, items)
        if self._sizes[at] == items or at == 0:
            return self._seconds[at]
        low, high = self._sizes[at - 1], self._sizes[at]
        share = (items - low) / (high - low)
        return (1 - share) * self._seconds[at - 1] + share * self._seconds[at]

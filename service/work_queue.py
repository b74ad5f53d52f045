"""What waits for a worker, in the order in which it is to be done: earliest deadline first within a class.

Interactive work goes before batch work; batch work that has waited for long gets a share of the batches, so that it is
not starved, and what has no deadline is ordered as if it had one. When not all can be in time, whoever has little time
left would keep batches small, and small batches make more of the others late: then those make way whose loss costs the
fewest (early drop; Shen et al. 2019, Nexus). Nothing here locks: whoever holds a queue sees to that.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ironclip.errors import DeadlineExceeded
from service.by_urgency import ByUrgency
from service.early_drop import Schedule
from service.tracing import place
from service.urgency import BATCH, CLASSES, INTERACTIVE, Urgency

Item = TypeVar("Item")

# This share of what is done goes to batch work that has waited too long, where there is interactive work too.
_LATE_SHARE = 8
# Deadlines within so many of the largest batches are looked at together.
_HORIZON = 2


class Entry(Generic[Item]):
    """One item on its way: who waits for it, what it costs, how urgent it is."""

    __slots__ = ("alone", "began_at", "cost", "future", "item", "place", "queued_at", "urgency")

    def __init__(self, item: Item, future: asyncio.Future[Any], cost: int, urgency: Urgency) -> None:
        self.item = item
        self.future = future
        self.cost = cost
        self.urgency = urgency
        self.alone = False  # it was in a batch that killed its worker, so it shares no further one
        self.queued_at = time.perf_counter()
        self.began_at = 0.0  # when its batch was begun, of several the last
        self.place = place()  # in the request's trace, where that is recorded

    @property
    def waited(self) -> float:
        """Seconds until its batch was begun, or until now where it was not."""
        return (self.began_at or time.perf_counter()) - self.queued_at

    def too_late(self, name: str, retry_after: float) -> DeadlineExceeded:
        """What whoever waits is told when it is given up.

        Args:
            name: of the model.
            retry_after: seconds after which it is worth asking again.
        """
        waited, left = time.perf_counter() - self.queued_at, self.urgency.deadline - time.monotonic()
        why = (
            f"{1000 * left:.0f} ms were left, and it or more of the others would have been late"
            if left > 0
            else "its deadline had passed"
        )
        error = DeadlineExceeded(
            f"After {1000 * waited:.0f} ms in the queue of the {name} model this was given up, not begun: {why}. Ask "
            "again later, or allow more with X-Request-Timeout-Ms (the service's own limit is "
            "IRONCLIP_REQUEST_TIMEOUT_MS).",
            retry_after=retry_after,
        )
        error.unbegun = left > 0
        return error


class WorkQueue(Generic[Item]):
    """Entries by class and deadline.

    Args:
        patience: seconds after which batch work is late; and by which work without a deadline is ordered.
    """

    def __init__(self, patience: float = math.inf) -> None:
        self.patience = patience
        self._entries: ByUrgency[Entry[Item]] = ByUrgency()
        self._arrivals: deque[int] = deque()  # of batch work, the oldest first
        self._costs = [0 for _ in CLASSES]
        self._last = [-math.inf for _ in CLASSES]  # no entry of the class comes later in the order
        self._credit = 0.0  # items of late batch work that may be done now

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def added(self) -> int:
        """How many entries ever came."""
        return self._entries.added

    def cost(self, rank: int = BATCH) -> int:
        """What waits of this class and of those before it, in items."""
        return sum(self._costs[: rank + 1])

    def before(self, urgency: Urgency) -> int:
        """What waits that is done before an entry of this urgency that came now, in items."""
        rank, order = urgency.rank, self._order(urgency)
        earlier = sum(self._costs[:rank])
        if order >= self._last[rank]:
            return earlier + self._costs[rank]
        return earlier + sum(self._entries[identity].cost for at, identity in self._entries.pairs(rank) if at <= order)

    def _order(self, urgency: Urgency) -> float:
        return urgency.deadline if math.isfinite(urgency.deadline) else time.monotonic() + self.patience

    def add(self, entry: Entry[Item]) -> int:
        """Put an entry in; returns what `discard` knows it by."""
        rank = entry.urgency.rank
        # What has been tried alone keeps nobody waiting by its deadline: it goes first.
        order = -math.inf if entry.alone else self._order(entry.urgency)
        self._last[rank] = order if self._entries.first(rank) is None else max(self._last[rank], order)
        identity = self._entries.add(rank, order, entry)
        if rank == BATCH:
            self._arrivals.append(identity)
        self._costs[rank] += entry.cost
        return identity

    def discard(self, identity: int) -> None:
        """Take an entry out that nobody waits for any more, if it is still there."""
        entry = self._entries.discard(identity)
        if entry is not None:
            self._costs[entry.urgency.rank] -= entry.cost

    def earliest(self) -> float:
        """No deadline of what waits is before this, by the monotonic clock."""
        firsts = (self._entries.first(rank) for rank in range(len(CLASSES)))
        return min((first[0] for first in firsts if first is not None), default=math.inf)

    def take(
        self, most: float, seconds: Callable[[int], float] = lambda items: 0.0
    ) -> tuple[list[Entry[Item]], list[Entry[Item]]]:
        """Take the most urgent entries out, up to a cost of ``most`` but at least one.

        A batch is no larger than what ends before the first deadline in it. What cannot be done in time any more makes
        way for what can, and so does what would make more of the others late. Where nothing can be in time, one entry
        is tried all the same, for estimates may be wrong.

        Args:
            most: items.
            seconds: how long a batch of so many items takes.

        Returns:
            Those to be done, and those whose deadline has passed or will have. What nobody waits for is in neither.
        """
        given_up = self._make_way(most, seconds)
        taken, expired, hopeless = self._cut(most, seconds)
        expired += given_up
        if taken or not hopeless:
            return taken, expired + hopeless
        # The one with most time left: it alone, or those that come meanwhile would be late too.
        best = max(hopeless, key=lambda entry: entry.urgency.deadline)
        return [best], expired + [entry for entry in hopeless if entry is not best]

    def _make_way(self, most: float, seconds: Callable[[int], float]) -> list[Entry[Item]]:
        """Take out those of the class whose turn it is that are given up for the others, where not all can be in time.

        Served in order, each batch ends before its first deadline. Of all the entries to begin with, that one is chosen
        which leaves the fewest late; of equal ones that whose batch does most in a second.
        """
        foremost = self._entries.foremost()
        now = time.monotonic()
        if foremost is None or not math.isfinite(most) or not (longest := seconds(int(most))):
            return []
        horizon = now + _HORIZON * longest
        rank, order, _ = foremost
        if not order < horizon or math.isinf(order):  # no haste, or one to be tried alone
            return []
        there = sorted(pair for pair in self._entries.pairs(rank) if pair[0] < horizon)
        # Nobody waits for a moment's end on work that has none.
        pressed = [(at, identity) for at, identity in there if math.isfinite(self._entries[identity].urgency.deadline)]
        costs = [self._entries[identity].cost for _, identity in pressed]
        schedule = Schedule(costs, [at - now for at, _ in pressed], int(most), seconds)
        start = schedule.best_start()
        over = now + schedule.first_seconds(start) + seconds(1) if start else now
        given_up = [(identity, self._entries[identity]) for at, identity in pressed[:start] if at < over]
        for identity, _ in given_up:
            self.discard(identity)
        return [entry for _, entry in given_up if not entry.future.cancelled()]

    def _cut(
        self, most: float, seconds: Callable[[int], float]
    ) -> tuple[list[Entry[Item]], list[Entry[Item]], list[Entry[Item]]]:
        """What is to be done, what has expired, and what will have before it is done."""
        taken: list[Entry[Item]] = []
        expired: list[Entry[Item]] = []
        hopeless: list[Entry[Item]] = []
        cost, now, first = 0, time.monotonic(), math.inf
        self._give_credit(most)
        while self._entries:
            identity, is_late = self._next()
            entry = self._entries[identity]
            deadline = entry.urgency.deadline
            if taken and (cost + entry.cost > most or entry.alone):
                break
            if taken and now + seconds(cost + entry.cost) > min(first, deadline):
                break
            self.discard(identity)
            if entry.future.cancelled():
                continue
            if deadline <= now:
                expired.append(entry)
                continue
            if not entry.alone and now + seconds(entry.cost) > deadline:
                hopeless.append(entry)
                continue
            taken.append(entry)
            first = min(first, deadline)
            cost += entry.cost
            self._credit -= entry.cost if is_late else 0
            if entry.alone:
                break
        return taken, expired, hopeless

    def peek(self, most: int) -> list[Entry[Item]]:
        """About what `take` would take now, up to so many entries, left where they are; late work is not seen to."""
        found: list[Entry[Item]] = []
        for rank in (INTERACTIVE, BATCH):
            pairs = heapq.nsmallest(most - len(found), self._entries.pairs(rank))
            found += [self._entries[identity] for _, identity in pairs]
        return found

    def _give_credit(self, most: float) -> None:
        """Before a batch: late batch work may do its share of it, and saves up for what costs more."""
        oldest = self._late()
        share = most / _LATE_SHARE
        self._credit = 0.0 if oldest is None else min(self._credit + share, max(share, self._entries[oldest].cost))

    def _late(self) -> int | None:
        """Batch work that has waited too long and would have to wait for interactive work."""
        while self._arrivals and self._arrivals[0] not in self._entries:
            self._arrivals.popleft()
        if not self._arrivals or self._entries.first(INTERACTIVE) is None:
            return None
        oldest = self._arrivals[0]
        return oldest if time.perf_counter() - self._entries[oldest].queued_at > self.patience else None

    def _next(self) -> tuple[int, bool]:
        """The next entry, and whether it is batch work that goes before its turn. There must be one."""
        oldest = self._late()
        if oldest is not None and self._entries[oldest].cost <= self._credit:
            return oldest, True
        foremost = self._entries.foremost()
        assert foremost is not None
        return foremost[2], False

"""Who is let in: a request is refused when the work ahead of it would take too long.

What it brings itself does not count, so the rule is the same for one item and for many. Nothing here locks: whoever
holds an Admission sees to that.
"""

from __future__ import annotations

import math
import time
from typing import Generic, TypeVar

from ironclip.errors import Overloaded
from service.pace import Pace
from service.retry_after import RetryAfter
from service.urgency import CLASSES, CURRENT
from service.work_queue import WorkQueue

Item = TypeVar("Item")


class Room:
    """Items that a request was let in with before they were there."""

    __slots__ = ("cost", "rank")

    def __init__(self, rank: int, cost: int) -> None:
        self.rank = rank
        self.cost = cost


class Admission(Generic[Item]):
    """The door of one queue.

    Args:
        name: for messages.
        queue: what waits.
        pace: how long it will take.
        max_batch: items in one batch at most.
        max_queue: items of a class and of those before it that wait, with which no further request is let in.
        max_wait: seconds of work that may be ahead of a request.
    """

    def __init__(
        self, name: str, queue: WorkQueue[Item], pace: Pace, *, max_batch: int, max_queue: int, max_wait: float
    ) -> None:
        self.name = name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_wait = max_wait
        self._queue = queue
        self._pace = pace
        self._reserved = [0 for _ in CLASSES]
        self._again = RetryAfter()

    def ahead_seconds(self, rank: int, running: float) -> float:
        """Seconds of work of this class and those before it: running, waiting, and let in but still on its way."""
        return self._pace.seconds(self._queue.cost(rank) + self._coming(rank)) + running

    def _coming(self, rank: int) -> int:
        """Items that were let in and are on their way, of this class and those before it."""
        return sum(self._reserved[: rank + 1])

    def admit(self, cost: int, running: float) -> None:
        """Let a request of the current urgency in.

        Args:
            cost: of its items.
            running: seconds that the batch under way still takes.

        Raises:
            Overloaded: what waits, or the time that it takes, is over a limit or leaves too little of the deadline.
        """
        urgency = CURRENT.get()
        coming = self._coming(urgency.rank)
        waiting = self._queue.cost(urgency.rank) + coming
        # What waits with a later deadline will be overtaken.
        before = self._queue.before(urgency) + coming
        ahead = self._pace.seconds(before) + running
        if waiting >= self.max_queue:
            raise Overloaded(
                f"{waiting} items wait for the {self.name} model, the limit is {self.max_queue} (IRONCLIP_MAX_QUEUE).",
                limit_name="queue-items",
                retry_after=self._come_again(ahead, urgency.rank, cost),
                limit=self.max_queue,
            )
        # On a slow machine one full batch may take longer than the limit, and batches are to fill all the same.
        most = max(self.max_wait, self._pace.seconds(self.max_batch))
        if ahead > most:
            raise Overloaded(
                f"{1000 * ahead:.0f} ms of work are ahead of this request at the {self.name} model, at most "
                f"{1000 * most:.0f} ms may be (IRONCLIP_MAX_QUEUE_MS).",
                limit_name="queue-ms",
                retry_after=self._come_again(ahead - most / 2, urgency.rank, cost),
                limit=round(1000 * most),
            )
        left = max(0.0, urgency.deadline - time.monotonic())
        # Where nothing is ahead it is let in whatever the estimate says: to try is how that is mended. Nothing is kept
        # in hand for what may go wrong: the queue does that when a batch is cut, and knows more by then.
        done = running + self._pace.seconds(before + cost)
        if ahead > 0 and done > left:
            raise Overloaded(
                f"{1000 * ahead:.0f} ms of work are ahead of this request at the {self.name} model; with its own it "
                f"takes {1000 * done:.0f} ms, and its deadline is {1000 * left:.0f} ms away (X-Request-Timeout-Ms, "
                "within IRONCLIP_REQUEST_TIMEOUT_MS).",
                limit_name="deadline",
                retry_after=self._come_again(ahead, urgency.rank, cost),
                limit=round(1000 * left),
            )

    def _come_again(self, seconds: float, rank: int, cost: int) -> float:
        """In how many seconds whoever is sent away now should come again; there is room in so many for the first."""
        each = self._pace.seconds(self.max_batch) / self.max_batch
        return self._again.seconds(time.monotonic(), max(seconds, self._pace.seconds(1)), rank, cost * each)

    def reserve(self, cost: int, running: float) -> Room:
        """Let a request in whose items are still to come; give the room back with `release`.

        Raises:
            Overloaded: as `admit`.
        """
        self.admit(cost, running)
        room = Room(CURRENT.get().rank, cost)
        self._reserved[room.rank] += cost
        return room

    def release(self, room: Room, cost: float = math.inf) -> None:
        """Give back what has come into the queue, or all of it."""
        used = int(min(cost, room.cost))
        room.cost -= used
        self._reserved[room.rank] -= used

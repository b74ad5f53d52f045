"""Pictures that wait for a thread, the most urgent first: nobody waits behind a bulk import's pictures.

Interactive work goes before batch work here as it does at the towers, and within a class whoever has the earliest
deadline; batch work that waits has every eighth turn. What cannot be in time any more makes way for what can.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ironclip.errors import DeadlineExceeded
from service.by_urgency import ByUrgency
from service.decode_pace import Claim
from service.images import DecodedImage
from service.urgency import BATCH, CLASSES, Urgency

# Of so many pictures taken while both classes wait, one is of batch work.
_BATCH_TURN = 8


@dataclass(eq=False)
class Waiting:
    """One picture: what decodes it, what it claims, how long that takes, and how urgent it is."""

    work: partial[DecodedImage]
    claim: Claim
    seconds: float
    urgency: Urgency
    future: Future[DecodedImage] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class DecodeQueue:
    """What waits, by class and deadline; what nobody waits for any more is let go of at once.

    Locks itself.
    """

    def __init__(self) -> None:
        self._works: ByUrgency[Waiting] = ByUrgency()
        self._seconds = [0.0 for _ in CLASSES]
        self._lock = threading.Lock()
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._works)

    def add(self, picture: Waiting) -> Future[DecodedImage]:
        """Let a picture wait; its future says what becomes of it."""
        with self._lock:
            identity = self._works.add(picture.urgency.rank, picture.urgency.deadline, picture)
            self._seconds[picture.urgency.rank] += picture.seconds
        picture.future.add_done_callback(partial(self._forget, identity))
        return picture.future

    def _forget(self, identity: int, future: Future[DecodedImage]) -> None:
        if future.cancelled():
            with self._lock:
                self._discard(identity)

    def _discard(self, identity: int) -> Waiting | None:
        picture = self._works.discard(identity)
        if picture is not None:
            rank = picture.urgency.rank
            self._seconds[rank] = self._seconds[rank] - picture.seconds if len(self._works) else 0.0
        return picture

    def seconds(self, rank: int) -> float:
        """Seconds of one thread that what waits of this class and of those before it will take."""
        with self._lock:
            return max(0.0, sum(self._seconds[: rank + 1]))

    def seconds_before(self, urgency: Urgency) -> float:
        """Seconds of one thread that what waits takes which is decoded before a picture that came now."""
        with self._lock:
            earlier = sum(self._seconds[: urgency.rank])
            pairs = self._works.pairs(urgency.rank)
            return earlier + sum(self._works[identity].seconds for at, identity in pairs if at <= urgency.deadline)

    def take(self) -> tuple[Waiting | None, list[Waiting]]:
        """The next one that somebody still waits for, which counts as running; and those that made way for it.

        Where nothing can be in time the last is tried all the same, for estimates may be wrong.
        """
        late: list[Waiting] = []
        while True:
            with self._lock:
                first = self._first()
                picture = self._discard(first) if first is not None else None
                others = len(self._works)
            if picture is None or not picture.future.set_running_or_notify_cancel():
                if picture is None:
                    return None, late
                continue
            if not others or time.monotonic() + picture.seconds <= picture.urgency.deadline:
                return picture, late
            late.append(picture)

    def _first(self) -> int | None:
        firsts = [first for rank in range(len(CLASSES)) if (first := self._works.first(rank)) is not None]
        if len(firsts) < len(CLASSES):
            self._overtaken = 0
            return firsts[0][1] if firsts else None
        self._overtaken = (self._overtaken + 1) % _BATCH_TURN
        return firsts[BATCH if self._overtaken == 0 else 0][1]

    def cancel(self) -> None:
        """Let all of them go."""
        with self._lock:
            left = self._works.values()
        for picture in left:
            picture.future.cancel()


def too_late(picture: Waiting, retry_after: float) -> DeadlineExceeded:
    """What whoever waits for a picture is told that made way for others."""
    now = time.monotonic()
    waited, left = now - picture.since, max(0.0, picture.urgency.deadline - now)
    error = DeadlineExceeded(
        f"After {1000 * waited:.0f} ms among the pictures that wait to be decoded this was given up, not begun: it "
        f"takes {1000 * picture.seconds:.0f} ms, and {1000 * left:.0f} ms were left. Ask again later, send a smaller "
        "picture, or allow more with X-Request-Timeout-Ms (the service's own limit is IRONCLIP_REQUEST_TIMEOUT_MS).",
        retry_after=retry_after,
    )
    error.unbegun = left > 0
    return error

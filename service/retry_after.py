"""When whoever is sent away should come again: when there is room, and behind those who were told before."""

from __future__ import annotations

from service.urgency import CLASSES

# Nobody is told more than this many seconds: by then others may have gone away for good.
_LONGEST = 30.0


class RetryAfter:
    """What the door of one queue tells those whom it sends away; knows no clock, and locks nothing.

    Told the same, all who come in a burst would come again in one, and most of them would be sent away again.
    """

    def __init__(self) -> None:
        self._told = [0.0 for _ in CLASSES]  # when whoever was sent away last is to come

    def seconds(self, now: float, room_in: float, rank: int, takes: float) -> float:
        """In how many seconds a request should come again.

        Args:
            now: by the monotonic clock.
            room_in: seconds until there is room for the first of those who are sent away.
            rank: class of the request; those of a class before it are told earlier.
            takes: seconds that it will take, which whoever is told next waits for.
        """
        at = max(now + room_in, *self._told[: rank + 1])
        self._told[rank] = min(at + takes, now + _LONGEST)
        return min(at - now, _LONGEST)

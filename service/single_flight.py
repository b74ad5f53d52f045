"""One piece of work for all who want the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from service.urgency import CURRENT, Urgency

T = TypeVar("T")


class _Flight:
    __slots__ = ("future", "waiters")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.waiters = 0


async def _for_all(work: Callable[[], Awaitable[T]]) -> T:
    """Do the work without the deadline of whoever happened to ask first: each waits as long as it can itself."""
    CURRENT.set(Urgency(CURRENT.get().rank))
    return await work()


class SingleFlight:
    """Runs one piece of work for a key at a time; whoever comes meanwhile waits for the same result.

    A caller that is cancelled leaves the work to the others; with the last one it is given up.
    """

    def __init__(self) -> None:
        self._running: dict[object, _Flight] = {}

    async def run(self, key: object, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `work`, started here or already under way."""
        flight = self._running.get(key)
        if flight is None:
            flight = self._running[key] = _Flight(asyncio.ensure_future(_for_all(work)))
            flight.future.add_done_callback(partial(self._finish, key, flight))
        flight.waiters += 1
        try:
            result: T = await asyncio.shield(flight.future)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.future.done():
                # Taken out at once: who comes before the work has ended must not share its cancellation.
                self._forget(key, flight)
                flight.future.cancel()
        return result

    def _finish(self, key: object, flight: _Flight, future: asyncio.Future[Any]) -> None:
        self._forget(key, flight)
        if not future.cancelled():
            future.exception()  # taken note of, for when every caller has gone

    def _forget(self, key: object, flight: _Flight) -> None:
        if self._running.get(key) is flight:
            del self._running[key]

"""How a batch is run so that what fails is the item that fails, and how outcomes reach those who wait for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ironclip.errors import OutOfMemory

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG = logging.getLogger("ironclip.service.batching")
_GROW_AFTER = 50  # batches after one that memory did not suffice for


@dataclass(frozen=True)
class Failure:
    """What came of an item in place of a result."""

    error: Exception


class Attempts(Generic[Item, Result]):
    """Runs batches: one that raises is halved and run again, until the guilty items stand alone.

    Where memory does not suffice, batches are smaller from then on, and grow again after a while. Nothing here locks:
    one thread runs, and `fits` may be read by any.

    Args:
        name: for messages.
        run: as `Batcher` has it.
        max_batch: items in one call at most, weighed by `cost`.
        out_of_memory: whether an exception says that the batch was too large for the device.
        free_memory: gives back what is kept for batches like the one that was too large; called before it is halved.
        cost: how many plain items an item counts for.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        max_batch: int,
        out_of_memory: Callable[[Exception], bool] | None,
        cost: Callable[[Item], int] = lambda item: 1,
        free_memory: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.max_batch = max_batch
        self.fits = max_batch  # items that a batch may have
        self._run = run
        self._out_of_memory = out_of_memory or (lambda error: isinstance(error, MemoryError))
        self._free_memory = free_memory or (lambda: None)
        self._cost = cost
        self._since_full = 0

    def run(self, items: list[Item]) -> list[Result | Failure]:
        """A result or a failure for each item, in order."""
        try:
            results = self._run(items)
        except Exception as error:
            memory = self._out_of_memory(error)
            if len(items) == 1 and not memory:
                return [Failure(error)]
        else:
            if len(results) != len(items):
                # Results of unknown owners: nobody may be given one.
                text = f"the {self.name} model returned {len(results)} results for {len(items)} items"
                return [Failure(RuntimeError(text)) for _ in items]
            return list(results)
        # Not while the exception is handled: it holds all that the failed batch had in hand, and the halves would have
        # to find room beside it.
        if memory:
            _LOG.warning("no memory for a batch of %d of the %s model", len(items), self.name)
            self._free_memory()
        if len(items) == 1:
            return [Failure(OutOfMemory(f"The {self.name} model has no memory for this."))]
        if memory:
            half = sum(self._cost(item) for item in items) // 2
            self.fits, self._since_full = min(self.fits, max(1, half)), 0
        middle = len(items) // 2
        return self.run(items[:middle]) + self.run(items[middle:])

    def grow(self) -> None:
        """Try larger batches again some time after memory did not suffice for one; called after each batch."""
        if self.fits < self.max_batch:
            self._since_full += 1
            if self._since_full >= _GROW_AFTER:
                self.fits, self._since_full = min(self.max_batch, 2 * self.fits), 0


def deliver(outcomes: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hand outcomes to their futures, from any thread, with one wake-up of each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for future, outcome in outcomes:
        loops.setdefault(future.get_loop(), []).append((future, outcome))
    for loop, pairs in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:
            _LOG.debug("a caller's event loop is closed; %d results dropped", len(pairs))


def _resolve(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in pairs:
        if future.done():
            continue
        if not isinstance(outcome, Failure):
            future.set_result(outcome)
        elif isinstance(outcome.error, StopIteration):  # a future cannot carry one
            future.set_exception(RuntimeError("the model raised StopIteration"))
        else:
            future.set_exception(outcome.error)

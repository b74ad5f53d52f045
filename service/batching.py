"""Dynamic batching: one bounded queue and one worker thread for each tower of each encoder.

The batch is cut late: only when the worker is free, so it grows by itself while the device is busy and is one
item when nobody else asks. An idle worker waits a moment for company, but only where company is known to be on
its way (`more_expected`). Where the device is the CPU, waiting for items that are being prepared wastes nothing,
since the same cores prepare them: there every batch waits for them (`shares_cores`). Items are counted, not
requests; a request's items may be split over batches and are joined again. What fails is the item that fails: a
batch that raises is halved and run again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from ironclip.errors import NotReady, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG = logging.getLogger("ironclip.service.batching")
_PATIENCE = 10  # the longest wait of an idle worker, in units of the wait for one item
_CORE_PATIENCE = 0.5  # the longest wait on shared cores, in units of the time that a full batch takes
_GAP_SHARE = 20  # while items wait, a gap is made after so many times what the last one took
_LOOK = 0.002  # seconds between looks whether what was expected has come
_MEMORY = 0.8  # weight of the past in the running mean of seconds per item


@dataclass(frozen=True)
class _Failure:
    error: Exception


class _Entry(Generic[Item]):
    __slots__ = ("cost", "future", "item", "queued_at")

    def __init__(self, item: Item, future: asyncio.Future[Any], cost: int) -> None:
        self.item = item
        self.future = future
        self.cost = cost
        self.queued_at = time.perf_counter()


class Gaps(Protocol):
    """Work that is done between batches.

    A piece is short, since whoever comes meanwhile waits for its end. While items wait, or are about to come
    (`more_expected`), one piece in a while is run all the same, so that this work does not starve.
    """

    @property
    def pending(self) -> bool:
        """Whether there is a piece to run; any thread may ask."""

    @property
    def urgent(self) -> bool:
        """Whether the next piece takes next to nothing and is not to wait; the worker's thread asks."""

    def step(self) -> None:
        """Run one piece, in the worker's thread; must not raise."""


class Batcher(Generic[Item, Result]):
    """Gathers items from coroutines (of any event loop) into batches for one function in one thread.

    Args:
        name: for messages and the thread's name.
        run: called in the worker thread with 1..max_batch items; returns one result for each, in order. What it
            raises is given to the item that causes it.
        max_batch: items in one call at most, weighed by `cost`.
        max_queue: items waiting at most, weighed by `cost`; a request larger than that is taken only while
            nothing waits.
        idle_wait_ms: how long an idle worker waits for the next item before it starts a batch that is not full;
            ten times that in all.
        more_expected: says whether more items are about to come; while it says no, an idle worker starts at once.
        shares_cores: the model runs on the cores that prepare the items. A batch that is not full then waits for
            those being prepared, after a busy spell too, up to half the time that a full one takes; and while it
            is smaller than the last one was, for `idle_wait_ms` after each item: callers just answered come back.
        on_batch: called after each batch, in the worker thread, with its cost, the seconds it ran, and the
            seconds that its oldest item had waited.
        cost: how many plain items an item counts for (a picture seen in N views: N); 1 for all by default.
        gaps: work for the worker's thread while no item waits, a piece at a time: see Gaps.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 32,
        max_queue: int = 512,
        idle_wait_ms: float = 2.0,
        more_expected: Callable[[], bool] | None = None,
        shares_cores: bool = False,
        on_batch: Callable[[int, float, float], None] | None = None,
        cost: Callable[[Item], int] | None = None,
        gaps: Gaps | None = None,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or idle_wait_ms < 0:
            raise ValueError("max_batch and max_queue must be at least 1, idle_wait_ms at least 0")
        self.name = name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.last_progress = time.monotonic()
        self._run = run
        self._idle_wait = idle_wait_ms / 1000
        self._more_expected = more_expected or (lambda: True)
        self._gaps_yield = more_expected or (lambda: False)
        self._shares_cores = shares_cores
        self._last_cost = 0  # of the last batch
        self._on_batch = on_batch
        self._cost = cost or (lambda item: 1)
        self._gaps = gaps
        self._gap_due = 0.0  # when a gap is made even though items wait
        self._changed = threading.Condition(threading.Lock())
        self._waiting: OrderedDict[int, _Entry[Item]] = OrderedDict()
        self._queued = 0  # cost of what waits
        self._current: list[_Entry[Item]] = []
        self._next_id = 0
        self._stopping = False
        self._dead = False
        self._thread: threading.Thread | None = None
        self._seconds, self._items = 0.0, 0.0

    def start(self) -> None:
        """Start the worker thread; does nothing if it runs."""
        with self._changed:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopping = self._dead = False
            self._thread = threading.Thread(target=self._work, name=f"batch-{self.name}", daemon=True)
            self._thread.start()

    @property
    def queued(self) -> int:
        """Items waiting, weighed by cost, those of a running batch not counted."""
        return self._queued

    @property
    def busy(self) -> bool:
        """Whether a batch is running."""
        return bool(self._current)

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs; once False, every submit raises NotReady."""
        return self._thread is not None and self._thread.is_alive() and not self._dead

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the worker last moved while it has work; 0 when it has none."""
        return time.monotonic() - self.last_progress if self._current or self._waiting else 0.0

    @property
    def estimated_wait_seconds(self) -> float:
        """How long an item that came now would wait, by the rate of the last batches; 0 before the first."""
        return (self._queued + sum(entry.cost for entry in self._current)) * self._seconds_per_item

    @property
    def _seconds_per_item(self) -> float:
        return self._seconds / self._items if self._items else 0.0

    async def submit(self, item: Item) -> Result:
        """Queue one item and wait for its result; a caller that is cancelled takes its item out again.

        Raises:
            Overloaded: the queue is full; `retry_after` is when there should be room.
            NotReady: not started, stopping, or the worker died.
            Exception: whatever `run` raised for this item.
        """
        (future,) = self._enqueue([item])
        result: Result = await future
        return result

    async def submit_many(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Queue the items of one request, all or none; return results in order, an exception where one failed.

        Raises:
            Overloaded, NotReady: as `submit`.
        """
        outcomes = await asyncio.gather(*self._enqueue(items), return_exceptions=True)
        results: list[Result | Exception] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                raise outcome
            results.append(outcome)
        return results

    async def stop(self, drain: bool = True) -> None:
        """Refuse new items, run what waits (or fail it with NotReady, without `drain`), and end the worker."""
        with self._changed:
            self._stopping = True
            abandoned = [] if drain and self.alive else self._take(math.inf)
            self._changed.notify_all()
        self._fail(abandoned, "The service is stopping.")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _enqueue(self, items: Sequence[Item]) -> list[asyncio.Future[Any]]:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        with self._changed:
            if self._stopping or not self.alive:
                state = "is stopping" if self._stopping else "is not running"
                raise NotReady(f"The {self.name} worker {state}.")
            costs = [self._cost(item) for item in items]
            if self._queued and self._queued + sum(costs) > self.max_queue:
                raise Overloaded(
                    f"{self._queued} items wait for the {self.name} model and {sum(costs)} more would pass the limit "
                    f"of {self.max_queue} (IRONCLIP_MAX_QUEUE).",
                    retry_after=self.estimated_wait_seconds,
                    limit=self.max_queue,
                )
            self._queued += sum(costs)
            for item, future, cost in zip(items, futures, costs, strict=True):
                self._waiting[self._next_id] = _Entry(item, future, cost)
                future.add_done_callback(partial(self._forget, self._next_id))
                self._next_id += 1
            self._changed.notify()
        return futures

    def _forget(self, identity: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            with self._changed:
                entry = self._waiting.pop(identity, None)
                self._queued -= entry.cost if entry is not None else 0

    def _work(self) -> None:
        idle = True
        try:
            while True:
                if self._make_gap():
                    continue
                with self._changed:
                    if not self._await_items(idle):
                        return
                    if not self._waiting:
                        continue  # a gap has work
                    idle = False
                    self._current = self._take(self.max_batch)
                    self.last_progress = time.monotonic()
                if self._current:
                    self._serve(self._current)
        except BaseException:
            # Not an error of an item: the thread itself is done for. Waiting callers must not hang.
            _LOG.exception("the %s worker died", self.name)
        finally:
            with self._changed:
                self._dead = True
                lost = self._current + self._take(math.inf)
                self._current = []
            self._fail(lost, f"The {self.name} worker stopped; the service must be restarted.")

    def nudge(self) -> None:
        """Wake the worker, since a gap has work."""
        with self._changed:
            self._changed.notify()

    def _make_gap(self) -> bool:
        """Run one piece of other work where there is any, and nothing waits or a piece is due; True if one was run."""
        gaps = self._gaps
        if gaps is None or not gaps.pending:
            return False
        if not self._gap_may_run(gaps):
            return False
        began = time.monotonic()
        gaps.step()
        self.last_progress = now = time.monotonic()
        self._gap_due = max(self._gap_due, now + _GAP_SHARE * (now - began))
        return True

    def _gap_may_run(self, gaps: Gaps) -> bool:
        """Whether a piece may be run now: no item waits or is about to come, or it is due, or costs nothing."""
        yields = self._waiting or self._gaps_yield()
        return not yields or gaps.urgent or time.monotonic() >= self._gap_due

    def _await_items(self, idle: bool) -> bool:
        """Sleep until there is something to cut, or a gap has work; False when stopping with nothing left.

        Holds the lock.
        """
        idle = idle or not self._waiting
        while not self._waiting:
            if self._stopping:
                return False
            if self._gaps is not None and self._gaps.pending:
                if self._gap_may_run(self._gaps):
                    return True
                self._changed.wait(_LOOK)  # an item is about to come, or fails, which wakes nobody
            else:
                self._changed.wait()
        if self._idle_wait and (idle or self._shares_cores):
            self._await_company()
        return True

    def _await_company(self) -> None:
        """Let items gather that follow each other closely, while more are expected. Holds the lock."""
        patience = _PATIENCE * self._idle_wait
        if self._shares_cores:
            patience = max(patience, _CORE_PATIENCE * self.max_batch * self._seconds_per_item)
        last = time.monotonic() + patience
        seen, due = self._next_id, time.monotonic() + self._idle_wait
        while self._queued < self.max_batch and not self._stopping:
            coming = self._more_expected()
            if not coming and not (self._shares_cores and self._queued < self._last_cost):
                return
            now = time.monotonic()
            left = min(last if coming and self._shares_cores else due, last) - now
            if left <= 0:
                return
            # What is expected may also fail, which wakes nobody: look again after a while.
            self._changed.wait(min(left, self._idle_wait))
            if self._next_id != seen or (coming and self._shares_cores):
                seen, due = self._next_id, time.monotonic() + self._idle_wait

    def _take(self, most: float) -> list[_Entry[Item]]:
        """Take entries off the front, up to a cost of `most` but at least one. Holds the lock.

        Those nobody waits for any more are left out.
        """
        taken: list[_Entry[Item]] = []
        cost = 0
        while self._waiting:
            identity, entry = next(iter(self._waiting.items()))
            if taken and cost + entry.cost > most:
                break
            del self._waiting[identity]
            self._queued -= entry.cost
            if not entry.future.cancelled():
                taken.append(entry)
                cost += entry.cost
        return taken

    def _serve(self, batch: list[_Entry[Item]]) -> None:
        began = time.perf_counter()
        outcomes = self._attempt([entry.item for entry in batch])
        seconds = time.perf_counter() - began
        self._seconds = _MEMORY * self._seconds + seconds
        cost = sum(entry.cost for entry in batch)
        self._items = _MEMORY * self._items + cost
        self._last_cost = cost
        self.last_progress = time.monotonic()
        self._current = []
        _deliver([(entry.future, outcome) for entry, outcome in zip(batch, outcomes, strict=True)])
        if self._on_batch is not None:
            try:
                self._on_batch(cost, seconds, began - batch[0].queued_at)
            except Exception:
                _LOG.exception("the observer of the %s batches failed", self.name)

    def _attempt(self, items: list[Item]) -> list[Result | _Failure]:
        """Run items; where that raises, halve until the guilty ones stand alone."""
        try:
            results = self._run(items)
        except Exception as error:
            if len(items) == 1:
                return [_Failure(error)]
            middle = len(items) // 2
            return self._attempt(items[:middle]) + self._attempt(items[middle:])
        if len(results) != len(items):
            # Results of unknown owners: nobody may be given one.
            text = f"the {self.name} model returned {len(results)} results for {len(items)} items"
            return [_Failure(RuntimeError(text)) for _ in items]
        return list(results)

    def _fail(self, entries: list[_Entry[Item]], text: str) -> None:
        _deliver([(entry.future, _Failure(NotReady(text))) for entry in entries])


def _deliver(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hand outcomes to their futures with one wake-up of each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for future, outcome in outcomes:
        loops.setdefault(future.get_loop(), []).append((future, outcome))
    for loop, pairs in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, pairs)
        except RuntimeError:
            _LOG.debug("a caller's event loop is closed; %d results dropped", len(pairs))


def _resolve(pairs: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in pairs:
        if future.done():
            continue
        if not isinstance(outcome, _Failure):
            future.set_result(outcome)
        elif isinstance(outcome.error, StopIteration):  # a future cannot carry one
            future.set_exception(RuntimeError("the model raised StopIteration"))
        else:
            future.set_exception(outcome.error)

"""Dynamic batching: one bounded queue and one worker thread for each tower of each encoder.

The batch is cut late: only when the worker is free, so it grows by itself while the device is busy and is one
item when nobody else asks. An idle worker waits a moment for company, but only where company is known to be on
its way (`more_expected`). Where the device is the CPU, waiting for items that are being prepared wastes nothing,
since the same cores prepare them: there every batch waits for them (`shares_cores`). Items are counted, not
requests; a request's items may be split over batches and are joined again. What fails is the item that fails: see
`service.attempts`.

What is let in is bounded by time: see `Admission`. `reserve` asks before a request's items are prepared.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from ironclip.errors import IronclipError, NotReady
from service import waits
from service.admission import Admission, Room
from service.attempts import Attempts, Failure, deliver
from service.pace import Pace
from service.tracing import note_batch
from service.urgency import BATCH, CURRENT
from service.work_queue import Entry, WorkQueue

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG = logging.getLogger("ironclip.service.batching")
_PATIENCE = 10  # the longest wait of an idle worker, in units of the wait for one item
_CORE_PATIENCE = 0.5  # the longest wait on shared cores, in units of the time that a full batch takes
_GAP_SHARE = 20  # while items wait, a gap is made after so many times what the last one took
_LOOK = 0.002  # seconds between looks whether what was expected has come
_HANG = 10  # a batch that takes so many times what was estimated, and the limit at least, is not waited for
_GAP_HANG = 60.0  # seconds after which a stop waits no more for a piece of other work, whose time is not known here
_SUSPICIOUS = 3  # batches in a row of which nothing came but faults
_GRACE = 1.0  # seconds after a death for which items are still taken: the next worker is about to start


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
        max_queue: items of a class and of those before it that wait at most, weighed by `cost`; a request larger than
            that is taken only while nothing waits.
        max_wait: seconds of work that may be ahead of a request that is let in.
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
        out_of_memory: whether an exception says that the batch was too large for the device.
        free_memory: gives back what the device keeps for batches like the one that was too large.
        supervised: somebody starts the worker again when it dies: what waits is kept for the next one, and what was
            in the batch is tried once more, each item alone.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 32,
        max_queue: int = 512,
        max_wait: float = math.inf,
        idle_wait_ms: float = 2.0,
        more_expected: Callable[[], bool] | None = None,
        shares_cores: bool = False,
        on_batch: Callable[[int, float, float], None] | None = None,
        cost: Callable[[Item], int] | None = None,
        gaps: Gaps | None = None,
        out_of_memory: Callable[[Exception], bool] | None = None,
        free_memory: Callable[[], None] | None = None,
        supervised: bool = False,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or idle_wait_ms < 0:
            raise ValueError("max_batch and max_queue must be at least 1, idle_wait_ms at least 0")
        self.name = name
        self.max_batch = max_batch
        self.last_progress = time.monotonic()
        self.pace = Pace()
        self.on_expired: Callable[[int], None] | None = None  # told how many items' deadlines had passed
        self._cost = cost or (lambda item: 1)
        self._attempts: Attempts[Item, Result] = Attempts(name, run, max_batch, out_of_memory, self._cost, free_memory)
        self._idle_wait = idle_wait_ms / 1000
        self._more_expected = more_expected or (lambda: True)
        self._gaps_yield = more_expected or (lambda: False)
        self._shares_cores = shares_cores
        self._last_cost = 0  # of the last batch
        self._on_batch = on_batch
        self._gaps = gaps
        self._gap_due = 0.0  # when a gap is made even though items wait
        self._changed = threading.Condition(threading.Lock())
        self._queue: WorkQueue[Item] = WorkQueue(max_wait)
        self.admission = Admission(
            name, self._queue, self.pace, max_batch=max_batch, max_queue=max_queue, max_wait=max_wait
        )
        self._current: list[Entry[Item]] = []
        self._began = 0.0  # the current batch, monotonic
        self._stopping = self._dead = self._in_gap = False
        self._died_at = 0.0
        self.supervised = supervised
        self._thread: threading.Thread | None = None
        self._turn = 0  # of the worker: one that was replaced has an older one
        self._faults = 0  # batches in a row of which nothing came but faults
        self.batches = 0  # that gave at least one result

    def start(self) -> None:
        """Start the worker thread; does nothing if it runs."""
        with self._changed:
            if self._thread is not None and self._thread.is_alive() and not self._dead:
                return
            self._stopping = False
            self._begin()

    def _begin(self) -> None:
        """Start a worker; one that may still run has an older turn, and is not heard any more. Holds the lock."""
        self._turn += 1
        self._dead, self._in_gap, self._faults = False, False, 0
        self.last_progress = time.monotonic()
        self._changed.notify_all()  # an older worker that sleeps finds out
        self._thread = threading.Thread(
            target=self._work, args=(self._turn,), name=f"batch-{self.name}-{self._turn}", daemon=True
        )
        self._thread.start()

    def replace(self) -> None:
        """Leave a worker that hangs alone, with the batch it has, and start another."""
        with self._changed:
            self._turn += 1  # it is not heard any more
            lost, self._current = self._current, []
            stopping = self._stopping
        # First: they need not wait to hear whether there is a thread left for the next worker.
        self._fail(lost, f"The {self.name} worker {'is stopping' if stopping else 'hung and has been replaced'}.")
        with self._changed:
            if not self._stopping:
                self._begin()

    @property
    def queued(self) -> int:
        """Items waiting, weighed by cost, those of a running batch not counted."""
        return self._queue.cost()

    def upcoming(self) -> list[Item]:
        """What the next batch is likely to hold, for `run` to make ready while the device works; nothing is taken.

        The batch itself is still cut when the worker is free: to cut it now would shut out whoever comes meanwhile.
        """
        with self._changed:
            return [entry.item for entry in self._queue.peek(self.fits)]

    @property
    def busy(self) -> bool:
        """Whether a batch is running."""
        return bool(self._current)

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs; while False, every submit raises NotReady."""
        return self._thread is not None and self._thread.is_alive() and not self._dead

    @property
    def failing(self) -> bool:
        """Whether the last batches gave nothing but faults, which are hardly the items'."""
        return self._faults >= _SUSPICIOUS

    @property
    def fits(self) -> int:
        """Items that a batch may have: fewer than `max_batch` after memory did not suffice."""
        return self._attempts.fits

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the worker last moved while it has work; 0 when it has none."""
        busy = self._current or self._in_gap or len(self._queue)
        return max(0.0, time.monotonic() - self.last_progress) if busy else 0.0

    @property
    def last_progress_time(self) -> float:
        """When the worker last moved, seconds since 1970."""
        return time.time() - (time.monotonic() - self.last_progress)

    def hangs(self, limit: float) -> bool:
        """Whether the worker has not moved for ``limit`` seconds, and for far longer than its batch should take."""
        cost = sum(entry.cost for entry in self._current)
        return self.stalled_seconds > max(limit, _HANG * self.pace.seconds(cost))

    @property
    def stuck(self) -> bool:
        """Whether it hangs, by the measure of a stop: nothing that comes of it is worth waiting for."""
        return self.hangs(_GAP_HANG if self._in_gap else _HANG)

    @property
    def estimated_wait_seconds(self) -> float:
        """How long an item that came now would wait behind everything else; 0 before a pace is known."""
        return self.ahead_seconds(BATCH)

    def ahead_seconds(self, rank: int) -> float:
        """Seconds of work of this class and those before it: running, waiting, and let in but still on its way."""
        return self.admission.ahead_seconds(rank, self._seconds_left())

    def _seconds_left(self) -> float:
        """Of the running batch."""
        cost = sum(entry.cost for entry in self._current)
        return max(0.0, self.pace.seconds(cost) - (time.monotonic() - self._began)) if cost else 0.0

    async def submit(self, item: Item) -> Result:
        """Queue one item and wait for its result; a caller that is cancelled takes its item out again.

        Raises:
            Overloaded: the queue is full; `retry_after` is when there should be room.
            NotReady: not started, stopping, or the worker died.
            DeadlineExceeded: the request's deadline passed before its turn came.
            Exception: whatever `run` raised for this item.
        """
        (entry,) = self._enqueue([item])
        result: Result = await entry.future
        return result

    async def submit_many(self, items: Sequence[Item], room: Room | None = None) -> list[Result | Exception]:
        """Queue the items of one request, all or none; return results in order, an exception where one failed.

        Args:
            items: of one request.
            room: that was reserved for them.

        Raises:
            Overloaded, NotReady: as `submit`.
        """
        entries = self._enqueue(items, room)
        try:
            outcomes = await asyncio.gather(*[entry.future for entry in entries], return_exceptions=True)
        finally:  # a caller whose time is up has waited too
            if entries:
                waits.note(max([entry.waited for entry in entries]))
        results: list[Result | Exception] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                raise outcome
            results.append(outcome)
        return results

    @contextmanager
    def reserve(self, cost: int) -> Iterator[Room]:
        """Let a request in before its items are there: a refusal costs nothing yet, and those who come see them.

        Raises:
            Overloaded, NotReady: as `submit`.
        """
        with self._changed:
            self._open()
            room = self.admission.reserve(cost, self._seconds_left())
        try:
            yield room
        finally:
            self.release(room)

    def release(self, room: Room) -> None:
        """Give back what is left of a room; items that come afterwards are let in anew."""
        with self._changed:
            self.admission.release(room)

    async def stop(self, drain: bool = True) -> None:
        """Refuse new items, run what waits (or fail it with NotReady, without `drain`), and end the worker."""
        with self._changed:
            self._stopping = True
            abandoned = [] if drain and self.alive else self._take_all()
            self._changed.notify_all()
        self._fail(abandoned, "The service is stopping.")
        thread = self._thread
        while thread is not None and thread.is_alive() and not self.stuck:
            await asyncio.to_thread(thread.join, 1.0)
        with self._changed:
            self._turn += 1  # one that hangs is not heard any more
            left, self._current = self._current + self._take_all(), []
        self._fail(left, "The service is stopping.")

    def _admit(self, cost: int) -> None:
        """Let a request in, or raise; holds the lock."""
        self._open()
        self.admission.admit(cost, self._seconds_left())

    def _open(self) -> None:
        just_died = self.supervised and self._dead and time.monotonic() - self._died_at < _GRACE
        if self._stopping or not (self.alive or just_died):
            state = "is stopping" if self._stopping else "is not running"
            raise NotReady(f"The {self.name} worker {state}.", retry_after=1)

    def _enqueue(self, items: Sequence[Item], room: Room | None = None) -> list[Entry[Item]]:
        loop = asyncio.get_running_loop()
        urgency = CURRENT.get()
        with self._changed:
            costs = [self._cost(item) for item in items]
            total = sum(costs)
            self._open()
            if room is None or total > room.cost:
                self._admit(total - (room.cost if room is not None else 0))
            if room is not None:
                self.admission.release(room, total)
            if not self._current and not len(self._queue):
                self.last_progress = time.monotonic()  # the time without work is no time without progress
            entries = [
                Entry(item, loop.create_future(), cost, urgency) for item, cost in zip(items, costs, strict=True)
            ]
            for entry in entries:
                entry.future.add_done_callback(partial(self._forget, self._queue.add(entry)))
            self._changed.notify()
        return entries

    def _forget(self, identity: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            with self._changed:
                self._queue.discard(identity)

    def _work(self, turn: int) -> None:
        try:
            self._loop(turn)
        except BaseException:
            # Not an error of an item: the thread itself is done for. Waiting callers must not hang.
            _LOG.exception("the %s worker died", self.name)
        with self._changed:
            if turn != self._turn:
                return  # it was replaced; what it had has been answered
            self._dead, self._in_gap, self._died_at = True, False, time.monotonic()
            lost = self._survive()
            self._current = []
        self._fail(lost, f"The {self.name} worker stopped.")

    def _survive(self) -> list[Entry[Item]]:
        """Keep what the next worker can still do; returns what is lost. Holds the lock."""
        if self._stopping or not self.supervised:
            return self._current + self._take_all()
        lost = []
        for entry in self._current:
            if entry.alone:
                lost.append(entry)
            elif not entry.future.done():
                entry.alone = True
                forget = partial(self._forget, self._queue.add(entry))
                # Only its own loop may touch a future: one that is cancelled just now would call from this thread.
                with suppress(RuntimeError):  # the loop is closed, and nobody waits
                    entry.future.get_loop().call_soon_threadsafe(entry.future.add_done_callback, forget)
        return lost

    def _loop(self, turn: int) -> None:
        idle = True
        while turn == self._turn:
            if self._make_gap(turn):
                continue
            with self._changed:
                if not self._await_items(idle, turn):
                    return
                if not len(self._queue):
                    continue  # a gap has work
                idle = False
                self._current, expired = self._queue.take(self.fits, self.pace.surely)
                self._began = self.last_progress = time.monotonic()
            self._expire(expired)
            if self._current:
                self._serve(self._current, turn)

    def nudge(self) -> None:
        """Wake the worker, since a gap has work."""
        with self._changed:
            self._changed.notify()

    def _make_gap(self, turn: int) -> bool:
        """Run one piece of other work where there is any, and nothing waits or a piece is due; True if one was run."""
        gaps = self._gaps
        if gaps is None or not gaps.pending:
            return False
        if not self._gap_may_run(gaps):
            return False
        began = self.last_progress = time.monotonic()
        self._in_gap = True
        gaps.step()
        if turn != self._turn:
            return True
        self._in_gap = False
        self.last_progress = now = time.monotonic()
        self._gap_due = max(self._gap_due, now + _GAP_SHARE * (now - began))
        return True

    def _gap_may_run(self, gaps: Gaps) -> bool:
        """Whether a piece may be run now: no item waits or is about to come, or it is due, or costs nothing."""
        yields = len(self._queue) or self._gaps_yield()
        return not yields or gaps.urgent or time.monotonic() >= self._gap_due

    def _await_items(self, idle: bool, turn: int) -> bool:
        """Sleep until there is something to cut, or a gap has work; False when stopping with nothing left.

        Holds the lock.
        """
        idle = idle or not len(self._queue)
        while not len(self._queue):
            if self._stopping or turn != self._turn:
                return False
            if self._gaps is not None and self._gaps.pending:
                if self._gap_may_run(self._gaps):
                    return True
                self._changed.wait(_LOOK)  # an item is about to come, or fails, which wakes nobody
            else:
                self._changed.wait()
        if self._idle_wait and (idle or self._shares_cores):
            self._await_company()
        return turn == self._turn

    def _await_company(self) -> None:
        """Let items gather that follow each other closely, while more are expected. Holds the lock."""
        patience = _PATIENCE * self._idle_wait
        if self._shares_cores:
            patience = max(patience, _CORE_PATIENCE * self.pace.seconds(self.max_batch))
        last = min(time.monotonic() + patience, self._queue.earliest() - self.pace.surely(self.max_batch))
        seen, due = self._queue.added, time.monotonic() + self._idle_wait
        while self._queue.cost() < self.max_batch and not self._stopping:
            coming = self._more_expected()
            if not coming and not (self._shares_cores and self._queue.cost() < self._last_cost):
                return
            now = time.monotonic()
            left = min(last if coming and self._shares_cores else due, last) - now
            if left <= 0:
                return
            # What is expected may also fail, which wakes nobody: look again after a while.
            self._changed.wait(min(left, self._idle_wait))
            if self._queue.added != seen or (coming and self._shares_cores):
                seen, due = self._queue.added, time.monotonic() + self._idle_wait

    def _take_all(self) -> list[Entry[Item]]:
        """Empty the queue; holds the lock."""
        everything: list[Entry[Item]] = []
        while len(self._queue):
            taken, expired = self._queue.take(math.inf)
            everything += taken + expired
        return everything

    def _serve(self, batch: list[Entry[Item]], turn: int) -> None:
        began = time.perf_counter()
        for entry in batch:
            entry.began_at = began
        outcomes = self._attempts.run([entry.item for entry in batch])
        seconds = time.perf_counter() - began
        cost = sum(entry.cost for entry in batch)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        with self._changed:
            if turn != self._turn:
                return
            self._current = []
            self.last_progress = time.monotonic()
            self._last_cost = cost
            if not faults:  # else parts were run more than once
                self.pace.observe(cost, seconds)
            ours = sum(not isinstance(fault.error, IronclipError) for fault in faults)
            self._faults = self._faults + 1 if ours == len(outcomes) else 0
            self.batches += ours < len(outcomes)
            self._attempts.grow()
        self._note(batch, cost, began, seconds)
        deliver([(entry.future, outcome) for entry, outcome in zip(batch, outcomes, strict=True)])
        if self._on_batch is not None:
            try:
                self._on_batch(cost, seconds, began - batch[0].queued_at)
            except Exception:
                _LOG.exception("the observer of the %s batches failed", self.name)

    def _note(self, batch: list[Entry[Item]], cost: int, began: float, seconds: float) -> None:
        """Tell the traces of requests that are recorded; before the requests can end."""
        waits = [(entry.place, entry.queued_at) for entry in batch if entry.place is not None]
        if waits:
            try:
                note_batch(self.name, waits, cost, began, seconds)
            except Exception:
                _LOG.exception("a batch of the %s worker could not be traced", self.name)

    def _expire(self, entries: list[Entry[Item]]) -> None:
        if entries:
            if self.on_expired is not None:
                self.on_expired(len(entries))
            again = max(self.estimated_wait_seconds, self.pace.seconds(1))
            deliver([(entry.future, Failure(entry.too_late(self.name, again))) for entry in entries])

    def _fail(self, entries: list[Entry[Item]], text: str) -> None:
        failures = []
        for entry in entries:
            # One each: whoever answers a request may write into its error.
            error = NotReady(text, retry_after=1)
            error.by_item = entry.alone
            failures.append((entry.future, Failure(error)))
        deliver(failures)

"""Pictures decoded beside the event loop, the most urgent first: nobody waits behind a bulk import's pictures.

Interactive work goes before batch work here as it does at the towers, and within a class whoever has the earliest
deadline; batch work that waits has every eighth turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from ironclip.errors import NotReady, Overloaded
from ironclip.preprocessing import Preprocessing
from ironclip.resources import usable_cpus
from service import telemetry
from service.by_urgency import ByUrgency
from service.container import ImageLimits
from service.images import DecodedImage, decode
from service.urgency import BATCH, CLASSES, CURRENT

# Decodes that come out slower than this many seconds apart (and than four usual ones) are not waited for.
_LEAST_PACE = 0.01
# Pixels a second that a thread decodes at least where it does not hang; it is mostly ten times as many.
_SLOWEST = 2_500_000
# Of so many pictures taken while both classes wait, one is of batch work.
_BATCH_TURN = 8


class _Waiting:
    """Pictures that wait for a thread, by class and deadline; one that nobody waits for any more is let go of at once.

    Locks itself.
    """

    def __init__(self) -> None:
        self._works: ByUrgency[tuple[Future[DecodedImage], partial[DecodedImage]]] = ByUrgency()
        self._lock = threading.Lock()
        self._overtaken = 0

    def add(self, rank: int, deadline: float, work: partial[DecodedImage]) -> Future[DecodedImage]:
        future: Future[DecodedImage] = Future()
        with self._lock:
            identity = self._works.add(rank, deadline, (future, work))
        future.add_done_callback(partial(self._forget, identity))
        return future

    def _forget(self, identity: int, future: Future[DecodedImage]) -> None:
        if future.cancelled():
            with self._lock:
                self._works.discard(identity)

    def take(self) -> tuple[Future[DecodedImage], partial[DecodedImage]] | None:
        """The next one that somebody still waits for; it counts as running."""
        while True:
            with self._lock:
                first = self._first()
                found = self._works.discard(first) if first is not None else None
            if found is None or found[0].set_running_or_notify_cancel():
                return found

    def _first(self) -> int | None:
        firsts = [first for rank in range(len(CLASSES)) if (first := self._works.first(rank)) is not None]
        if len(firsts) < len(CLASSES):
            self._overtaken = 0
            return firsts[0][1] if firsts else None
        self._overtaken = (self._overtaken + 1) % _BATCH_TURN
        return firsts[BATCH if self._overtaken == 0 else 0][1]

    def cancel(self) -> None:
        with self._lock:
            left = self._works.values()
        for future, _ in left:
            future.cancel()


class ImageDecoder:
    """Runs `decode` in a small pool of threads, with a bound on what may wait.

    Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resamples, and pixels need no
    copy back. The checks before decoding bound time and memory of one picture.

    Args:
        limits: for every picture.
        workers: threads; 0 is one a core, within the CPU quota.
        max_pending: pictures of a class, and of those before it, that are being decoded or wait for it at most.
    """

    def __init__(self, limits: ImageLimits, *, workers: int = 0, max_pending: int = 256) -> None:
        self.limits = limits
        self.workers = workers or usable_cpus()
        self.max_pending = max_pending
        self._pending = [0 for _ in CLASSES]
        self._seconds = 0.005  # running mean of one decode
        self._moved = 0.0  # when a decode last ended, or the first of a spell was handed in
        self._begun: dict[int, float] = {}  # thread that has a picture -> since when
        self._turned = time.monotonic()  # when one last took a picture, or was done with it
        self._closed = False
        self._lock = threading.Lock()
        self._waiting = _Waiting()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    @property
    def pending(self) -> int:
        """Pictures being decoded or waiting for it."""
        return sum(self._pending)

    @property
    def flowing(self) -> bool:
        """Whether pictures are being decoded and come out at about the usual pace; a few huge ones do not."""
        usual = max(_LEAST_PACE, 4 * self._seconds)
        return self.pending > 0 and time.perf_counter() - self._moved < usual

    @property
    def stalled_seconds(self) -> float:
        """Seconds since a thread last took a picture or was done with one; 0 while one is free for the next."""
        with self._lock:
            return time.monotonic() - self._turned if len(self._begun) >= self.workers else 0.0

    @property
    def oldest_seconds(self) -> float:
        """Seconds that the thread which is at its picture for longest has been at it; 0 while none has one."""
        with self._lock:
            return time.monotonic() - min(self._begun.values()) if self._begun else 0.0

    def hangs(self, limit: float) -> bool:
        """Whether every thread has been at one picture for ``limit`` seconds, and for longer than the largest takes."""
        return self.stalled_seconds > max(limit, self.limits.max_pixels / _SLOWEST)

    async def decode(self, data: bytes, preprocessing: Preprocessing, declared_type: str | None = None) -> DecodedImage:
        """Decode in a worker thread; a caller that is cancelled leaves the queue.

        Raises:
            ImageError: as `decode`.
            Overloaded: `max_pending` pictures are waiting.
            NotReady: closed.
        """
        if self._closed:
            raise NotReady("The service is stopping.")
        rank, deadline = CURRENT.get()
        waiting = sum(self._pending[: rank + 1])
        if waiting >= self.max_pending:
            raise Overloaded(
                f"{waiting} pictures are waiting to be decoded, the limit is {self.max_pending} "
                "(IRONCLIP_MAX_QUEUE, or IRONCLIP_MAX_IMAGES where that is more).",
                limit_name="decode-items",
                retry_after=(waiting + 1) * self._seconds / self.workers,
                limit=self.max_pending,
            )
        with self._lock:
            if not self.pending:
                self._moved = time.perf_counter()
            self._pending[rank] += 1
        work = self._waiting.add(rank, deadline, partial(decode, data, preprocessing, self.limits, declared_type))
        # When the work ends, not when the caller stops waiting: a cancelled caller's decode may run on.
        work.add_done_callback(partial(self._count_down, rank))
        try:
            self._pool.submit(self._run_next)
        except RuntimeError:  # closed meanwhile
            work.cancel()
            raise NotReady("The service is stopping.") from None
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Refuse new work, drop what waits, and let running decodes end."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._waiting.cancel()

    def _run_next(self) -> None:
        """Decode what is most urgent now, which need not be what this turn was asked for."""
        found = self._waiting.take()
        if found is None:
            return
        future, work = found
        self._turn(begun=True)
        began = time.perf_counter()
        try:
            hand_out = partial(future.set_result, work())
        except BaseException as error:
            hand_out = partial(future.set_exception, error)
        try:
            seconds = time.perf_counter() - began
            self._seconds += 0.05 * (seconds - self._seconds)
            telemetry.DECODE_SECONDS.observe(seconds)
            self._turn(begun=False)
        finally:
            hand_out()  # last: who has the picture finds the thread free

    def _turn(self, *, begun: bool) -> None:
        """This thread has taken a picture, or is done with it."""
        with self._lock:
            self._turned = time.monotonic()
            if begun:
                self._begun[threading.get_ident()] = self._turned
            else:
                del self._begun[threading.get_ident()]

    def _count_down(self, rank: int, work: Future[DecodedImage]) -> None:
        with self._lock:
            self._pending[rank] -= 1
            self._moved = time.perf_counter()

"""Pictures decoded beside the event loop: who is let in, in what order they come, and whether the threads move.

A picture is a stage of work like a batch of the tower: a request is let in by the time that the pictures ahead of it
take, and told when to come again if that is too much (`service.decode_pace`, `service.decode_queue`).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from ironclip.errors import ImageError, NotReady, Overloaded
from ironclip.preprocessing import Preprocessing
from service import telemetry
from service.container import ImageLimits
from service.decode_pace import DecodePace, decode_threads, read_claim
from service.decode_queue import DecodeQueue, Waiting, too_late
from service.images import DecodedImage, decode
from service.retry_after import RetryAfter
from service.urgency import BATCH, CLASSES, CURRENT, INTERACTIVE, Urgency

# Decodes that come out slower than this many seconds apart (and than four usual ones) are not waited for.
_LEAST_PACE = 0.01
# Pixels a second that a thread decodes at least where it does not hang; it is mostly ten times as many.
_SLOWEST = 2_500_000


class ImageDecoder:
    """Runs `decode` in a small pool of threads, with a bound on what may wait.

    Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resamples, and pixels need no
    copy back. The checks before decoding bound time and memory of one picture.

    Args:
        limits: for every picture.
        workers: threads; 0: `decode_threads`.
        max_pending: pictures of a class, and of those before it, that are being decoded or wait for it, with which no
            further request is let in.
        max_wait: seconds of decoding that may be ahead of a request.
    """

    def __init__(
        self, limits: ImageLimits, *, workers: int = 0, max_pending: int = 256, max_wait: float = math.inf
    ) -> None:
        self.limits = limits
        self.workers = workers or decode_threads(limits.max_pixels)
        self.max_pending = max_pending
        self.max_wait = max_wait
        self._pending = [0 for _ in CLASSES]
        self._seconds = 0.005  # running mean of one decode
        self._moved = 0.0  # when a decode last ended, or the first of a spell was handed in
        self._begun: dict[int, tuple[float, float]] = {}  # thread that has a picture -> since when, and for how long
        self._turned = time.monotonic()  # when one last took a picture, or was done with it
        self._closed = False
        self._lock = threading.Lock()
        self._queue = DecodeQueue()
        self._pace = DecodePace()
        self._again = RetryAfter()
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
            return time.monotonic() - min(self._begun.values())[0] if self._begun else 0.0

    def hangs(self, limit: float) -> bool:
        """Whether every thread has been at one picture for ``limit`` seconds, and for longer than the largest takes."""
        return self.stalled_seconds > max(limit, self.limits.max_pixels / _SLOWEST)

    @property
    def queued(self) -> int:
        """Pictures that wait for a thread."""
        return len(self._queue)

    @property
    def estimated_wait_seconds(self) -> float:
        """How long a picture that came now, with all the time there is, would wait for a thread."""
        return self._ahead(self._queue.seconds(BATCH))

    def _ahead(self, waiting: float) -> float:
        """Seconds until a thread is free, with so many seconds of one thread's work waiting."""
        now = time.monotonic()
        with self._lock:
            if len(self._begun) < self.workers and not waiting:
                return 0.0
            running = sum(max(0.0, takes - (now - since)) for since, takes in self._begun.values())
        return (waiting + running) / self.workers

    def admit(self, pictures: Sequence[bytes]) -> None:
        """Let a request with these pictures in, by the time that those ahead of it take; its own do not count.

        Raises:
            Overloaded: too many wait, or take too long, or leave too little of the deadline.
        """
        urgency = CURRENT.get()
        pending = sum(self._pending[: urgency.rank + 1])
        takes = [self._pace.seconds(read_claim(data, self.limits.max_pixels)) for data in pictures]
        own = max(sum(takes) / self.workers, max(takes, default=0.0))
        left = max(0.0, urgency.deadline - time.monotonic())
        ahead = self._ahead(self._queue.seconds(urgency.rank))
        if ahead > self.max_wait or ahead + own > left:  # what waits with a later deadline will be overtaken
            ahead = self._ahead(self._queue.seconds_before(urgency))
        if pending >= self.max_pending:
            raise Overloaded(
                f"{pending} pictures are waiting to be decoded, the limit is {self.max_pending} "
                "(IRONCLIP_MAX_QUEUE, or IRONCLIP_MAX_IMAGES where that is more).",
                limit_name="decode-items",
                retry_after=self._come_again(ahead, urgency, own),
                limit=self.max_pending,
            )
        if ahead > self.max_wait:
            raise Overloaded(
                f"{1000 * ahead:.0f} ms of decoding are ahead of this request, at most {1000 * self.max_wait:.0f} ms "
                "may be (IRONCLIP_MAX_QUEUE_MS). Smaller pictures are decoded sooner; more threads for it are "
                "IRONCLIP_DECODE_WORKERS.",
                limit_name="decode-ms",
                retry_after=self._come_again(ahead - self.max_wait / 2, urgency, own),
                limit=round(1000 * self.max_wait),
            )
        # Where nothing is ahead it is let in whatever the estimate says: to try is how that is mended.
        if ahead > 0 and ahead + own > left:
            raise Overloaded(
                f"{1000 * ahead:.0f} ms of decoding are ahead of this request; its own pictures take "
                f"{1000 * own:.0f} ms, and its deadline is {1000 * left:.0f} ms away (X-Request-Timeout-Ms, within "
                "IRONCLIP_REQUEST_TIMEOUT_MS).",
                limit_name="deadline",
                retry_after=self._come_again(ahead, urgency, own),
                limit=round(1000 * left),
            )

    def _come_again(self, seconds: float, urgency: Urgency, own: float) -> float:
        return self._again.seconds(time.monotonic(), max(seconds, own), urgency.rank, own)

    async def decode(self, data: bytes, preprocessing: Preprocessing, declared_type: str | None = None) -> DecodedImage:
        """Decode in a worker thread what was let in (`admit`); a caller that is cancelled leaves the queue.

        Raises:
            ImageError: as `decode`.
            DeadlineExceeded: given up for others, since it could not be in time.
            NotReady: closed.
        """
        if self._closed:
            raise NotReady("The service is stopping.")
        urgency = CURRENT.get()
        with self._lock:
            if not self.pending:
                self._moved = time.perf_counter()
            self._pending[urgency.rank] += 1
        claim = read_claim(data, self.limits.max_pixels)
        work = partial(decode, data, preprocessing, self.limits, declared_type)
        future = self._queue.add(Waiting(work, claim, self._pace.seconds(claim), urgency))
        # When the work ends, not when the caller stops waiting: a cancelled caller's decode may run on.
        future.add_done_callback(partial(self._count_down, urgency.rank))
        try:
            self._pool.submit(self._run_next)
        except RuntimeError:  # closed meanwhile
            future.cancel()
            raise NotReady("The service is stopping.") from None
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Refuse new work, drop what waits, and let running decodes end."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._queue.cancel()

    def _run_next(self) -> None:
        """Decode what is most urgent now, which need not be what this turn was asked for."""
        picture, late = self._queue.take()
        for one in late:
            telemetry.EXPIRED.labels("decode").inc()
            one.future.set_exception(too_late(one, self._ahead(self._queue.seconds(INTERACTIVE))))
        if picture is None:
            return
        self._take(picture)
        began = time.perf_counter()
        try:
            hand_out, unread = partial(picture.future.set_result, picture.work()), False
        except BaseException as error:
            hand_out, unread = partial(picture.future.set_exception, error), isinstance(error, ImageError)
        try:
            seconds = time.perf_counter() - began
            self._seconds += 0.05 * (seconds - self._seconds)
            telemetry.DECODE_SECONDS.observe(seconds)
            self._done(picture, None if unread else seconds)
        finally:
            hand_out()  # last: who has the picture finds the thread free

    def _take(self, picture: Waiting) -> None:
        """This thread has taken a picture."""
        with self._lock:
            self._turned = time.monotonic()
            self._begun[threading.get_ident()] = self._turned, picture.seconds

    def _done(self, picture: Waiting, seconds: float | None) -> None:
        """This thread is done with its picture, in so many seconds if it could be read."""
        with self._lock:
            self._turned = time.monotonic()
            del self._begun[threading.get_ident()]
            if seconds is not None:
                self._pace.observe(picture.claim, seconds)

    def _count_down(self, rank: int, work: Future[DecodedImage]) -> None:
        with self._lock:
            self._pending[rank] -= 1
            self._moved = time.perf_counter()

"""Probes in progress: many at once, in pieces that fit between the batches of classifications.

A `Prober` belongs to one encoder and works in the thread of its image tower. Each of its steps is one forward and
backward of fixed size, one question to the served decision, or what one probe makes of its answers; between two of them
a classification may go ahead, and a probe that nobody waits for any more is dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ironclip.errors import IronclipError, NotReady, Overloaded
from ironclip.probe import Ask, Lane, Rows, pieces, steps
from ironclip.probe.oracle import Piece
from service import telemetry
from service.errors import InternalError
from service.probe_job import Job
from service.probe_places import Places, next_of, seconds_until_begun

_END = object()
_NEWEST = 0.2  # weight of the newest probe in the running mean of how much of their time they use


@dataclass
class _Round:
    """What is left to do until every probe has the answers it asked for."""

    steps: deque[tuple[Iterator[None], list[Job]]] = field(default_factory=deque)
    takes: deque[tuple[Job, list[tuple[Lane, Ask]]]] = field(default_factory=deque)

    def drop(self, job: Job) -> None:
        """Leave out what is of this probe alone."""
        left = [(going, [one for one in jobs if one is not job]) for going, jobs in self.steps]
        self.steps = deque((going, jobs) for going, jobs in left if jobs)
        self.takes = deque((one, asks) for one, asks in self.takes if one is not job)


class Prober:
    """Runs the probes of one encoder; `Gaps` of its image batcher.

    Args:
        rows: of a batch; `measured_rows` found them.
        places: for its probes and those of the other encoders.
        wake: called when there is work.
        describe: makes a problem of an error.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        places: Places,
        wake: Callable[[], None],
        describe: Callable[[IronclipError], dict[str, Any]],
    ) -> None:
        self.rows = rows
        self.places = places
        self._wake, self._describe = wake, describe
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._beginning: Job | None = None
        self._active: list[Job] = []
        self._round = _Round()
        self._worked: list[Job] = []  # those that the current step is for
        self._turn = 0  # of the worker's thread: one that was given up has an older one
        self._stopping = self._retiring = False
        self._used = 1.0  # share of their time that probes use, until some have ended
        self._log = telemetry.get_logger()
        places.add(self)

    @property
    def pending(self) -> bool:
        """Whether any probe runs, begins or waits."""
        return bool(self._waiting or self._beginning or self._active)  # in this order it goes from one to the next

    @property
    def urgent(self) -> bool:
        """Whether a probe is to end at once, which costs next to nothing."""
        over = any(job.cancelled or job.overdue for job in self._active)
        return self._stopping or self._retiring or over or any(job.cancelled for job in list(self._waiting))

    @property
    def running(self) -> int:
        """Probes that run or wait."""
        return self.running_of(None)

    def running_of(self, tenant: str | None) -> int:
        """The same of one tenant; of all for None."""
        waiting = [job for job in list(self._waiting) if not job.cancelled]
        # The worker moves it from one to the next meanwhile: it is looked for in this order, and counted once.
        beginning = self._beginning
        every = {id(job): job for job in (*waiting, *filter(None, [beginning]), *list(self._active))}
        return sum(tenant is None or job.tenant == tenant for job in every.values())

    def backlog_seconds(self, tenant: str) -> float:
        """Until a probe of this tenant that comes now is begun, as the last ones have used their time."""
        waiting, beginning, active = list(self._waiting), self._beginning, list(self._active)
        return seconds_until_begun(tenant, [*filter(None, [beginning]), *waiting], active, self._used)

    def submit(self, job: Job) -> None:
        """Take a probe on.

        Raises:
            Overloaded: too many run and wait.
            NotReady: stopping.
        """
        with self._lock:
            if self._stopping:
                raise _stopping()
            self._sweep()
            backlog = self.backlog_seconds(job.tenant)
            self.places.check(job.tenant, max(1.0, backlog))
            left = max(0.0, job.deadline - time.monotonic())
            if backlog > left:
                raise Overloaded(
                    f"Probes that run and wait may take {backlog:.0f} s before this one begins, and its deadline is "
                    f"{left:.0f} s away: ask with `Prefer: respond-async`, or allow more with X-Request-Timeout-Ms "
                    "(within IRONCLIP_REQUEST_TIMEOUT_MS).",
                    limit_name="deadline",
                    retry_after=max(1.0, backlog - left),
                    limit=round(1000 * left),
                )
            self._waiting.append(job)
        self._wake()

    def check_place(self, tenant: str) -> None:
        """Raise Overloaded where there is no place for one more probe of this tenant, as `submit` would."""
        self.places.check(tenant, max(1.0, self.backlog_seconds(tenant)))

    def _sweep(self) -> bool:
        """End what was cancelled while it waited, under the lock; whether there was any."""
        gone = [one for one in self._waiting if one.cancelled]
        for job in gone:
            self._waiting.remove(job)
            job.emit("cancelled", {})
            job.release()
        return bool(gone)

    def stop(self) -> None:
        """End what runs with what is known, and what waits with an error; takes no more."""
        with self._lock:
            self._stopping = True
        self._wake()

    def retire(self) -> None:
        """End what runs with what is known, and whatever comes as soon as it has begun: the encoder is to go."""
        with self._lock:
            self._retiring = True
        self._wake()

    def abandon(self) -> None:
        """Fail what is under way: the thread that worked on it is gone, or hangs."""
        self._fail_all(self._taken_away(), _started_again)

    def close(self) -> None:
        """Fail what is left after `stop`, where the thread that should have ended it is gone, or hangs."""
        jobs = self._taken_away()
        with self._lock:
            jobs += self._waiting
            self._waiting.clear()
        self._fail_all(jobs, _stopping)

    def _taken_away(self) -> list[Job]:
        """What is under way, which the thread that works on it has no longer a say in."""
        with self._lock:
            self._turn += 1
            jobs, self._active, self._round = self._active, [], _Round()
            if self._beginning is not None:
                jobs.append(self._beginning)
                self._beginning = None
        return jobs

    def _fail_all(self, jobs: list[Job], error: Callable[[], IronclipError]) -> None:
        for job in jobs:
            self._fail(job, error())  # one each: whoever answers a request may write into its error
            job.release()

    def step(self) -> None:
        """Do one piece."""
        turn, self._worked = self._turn, []
        try:
            self._step()
        except Exception:
            if turn != self._turn:
                return  # what it had was given up meanwhile, and is no longer there
            # Whose fault it is cannot be told: all that share the round end, the worker goes on.
            self._log.exception("a round of probes failed")
            self._fail_all(self._taken_away(), _fault)
        for job in self._worked:
            job.piece_ends()

    def _step(self) -> None:
        work = self._round
        with self._lock:
            self._sweep()
        if self._stopping:
            self._end_all()
        elif self._retiring and self._active:
            self._end_active()
        elif over := [job for job in self._active if job.cancelled or job.overdue]:
            for job in over:
                self._guarded(job, lambda job=job: self._give_up(job))  # type: ignore[misc]
        elif work.steps:
            going, jobs = work.steps.popleft()
            self._work_for(jobs)
            if self._advance(going, jobs):
                work.steps.appendleft((going, jobs))
        elif work.takes:
            job, answered = work.takes.popleft()
            self._work_for([job])
            self._guarded(job, lambda: self._take(job, answered))
        elif not self._admit():
            self._begin_round()

    def _work_for(self, jobs: list[Job]) -> None:
        """Note whose the piece is that begins now."""
        self._worked = jobs
        for job in jobs:
            job.piece_begins(len(jobs))

    def _advance(self, going: Iterator[None], jobs: list[Job]) -> bool:
        """Do a step; whether there are more. What fails of one probe alone fails it alone."""
        on = False

        def step() -> bool:
            nonlocal on
            on = next(going, _END) is not _END
            return True

        if len(jobs) > 1:
            step()
        else:
            self._guarded(jobs[0], step)
        return on

    def _give_up(self, job: Job) -> bool:
        """End a probe that nobody waits for, or whose time is up."""
        if job.cancelled:
            job.emit("cancelled", {})
            return False
        return self._end(job, "seconds")

    def _end(self, job: Job, why: str) -> bool:
        """End a probe with what is known."""
        assert job.probe is not None
        job.probe.stop(why)
        job.finish()
        return False

    def _guarded(self, job: Job, work: Callable[[], bool]) -> bool:
        """Whether the probe goes on after this; one that fails is told so, alone."""
        try:
            going = work()
        except IronclipError as error:
            self._fail(job, error)
            going = False
        except Exception:
            self._log.exception("a probe failed")
            self._fail(job, _fault())
            going = False
        if not going:
            if job in self._active:
                self._active.remove(job)
                self._used += _NEWEST * (min(1.0, (time.monotonic() - job.started) / job.seconds) - self._used)
            self._round.drop(job)
            job.release()
        return going

    def _admit(self) -> bool:
        """Begin one of those that wait; whether there was one, and a place for it."""
        with self._lock:
            job, turn = next_of(self._waiting, self._active), self._turn
            if job is None:
                return False
            self._beginning = job  # it counts all the time
            self._waiting.remove(job)
        self._work_for([job])
        begun = self._guarded(job, lambda: self._begin(job))
        with self._lock:
            if turn == self._turn:  # else it was abandoned meanwhile
                if begun:
                    self._active.append(job)
                self._beginning = None
        return True

    def _begin(self, job: Job) -> bool:
        if job.cancelled:
            job.emit("cancelled", {})
            return False
        job.begin()
        assert job.probe is not None
        if job.probe.done:
            job.finish()
        return not job.probe.done

    def _begin_round(self) -> None:
        work = self._round  # as long as this is worked on it may be given up, and another begun
        owners: dict[int, Job] = {}
        asked: list[Ask] = []

        def ask(job: Job) -> bool:
            assert job.probe is not None
            asks = job.probe.asks()
            work.takes.append((job, asks))
            for _, one in asks:
                owners[id(one)] = job
                asked.append(one)
            return True

        for job in list(self._active):
            self._guarded(job, lambda job=job: ask(job))  # type: ignore[misc]
        for piece in pieces(asked, self.rows):
            work.steps.append((_counted(piece), list(dict.fromkeys(owners[id(one)] for one in piece.asks))))
        work.steps.extend((one.confirm(), [owners[id(one)]]) for one in asked)

    def _take(self, job: Job, answered: list[tuple[Lane, Ask]]) -> bool:
        probe = job.probe
        assert probe is not None
        probe.take(answered)
        if probe.done:
            job.finish()
        else:
            job.tell()
        return not probe.done

    def _end_active(self) -> None:
        jobs, self._round = list(self._active), _Round()
        for job in jobs:
            self._guarded(job, lambda job=job: self._end(job, "cancelled"))  # type: ignore[misc]

    def _end_all(self) -> None:
        self._end_active()
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        self._fail_all(waiting, _stopping)

    def _fail(self, job: Job, error: IronclipError) -> None:
        job.fail(error, self._describe(error))


def _counted(piece: Piece) -> Iterator[None]:
    yield from steps(piece)
    telemetry.PROBE_STEPS.inc(len(piece.asks))


def _started_again() -> NotReady:
    return NotReady("The worker of this probe was started again; ask again.", retry_after=1)


def _stopping() -> NotReady:
    return NotReady("The service is stopping.")


def _fault() -> InternalError:
    return InternalError("Something went wrong in the service; its log has it.")

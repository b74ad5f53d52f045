"""Watches the model workers by their progress: starts a dead one again, replaces one that hangs, gives up in the end.

A thread cannot be killed. One that hangs is left with the batch it has, which is answered 503, and another takes the
queue over. A worker that gives nothing but faults is asked to encode a blank item, since its callers' items may be at
fault; where that fails too it is started anew. What does not help after some tries in a row is a matter for
whoever started the process: `on_given_up`. So is a decoder of which every thread is stuck, in a codec mostly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ironclip.errors import Overloaded
from service import telemetry

# Seconds before each start in a row; the last one is repeated.
_BACK_OFF = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_LOOK = 0.25


class Decoder(Protocol):
    """What is watched and cannot be started anew: the threads that decode pictures."""

    def hangs(self, limit: float) -> bool:
        """Whether none of them has moved for so long."""


class Worker(Protocol):
    """What is watched: a Batcher."""

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""

    @property
    def failing(self) -> bool:
        """Whether it gives nothing but faults."""

    @property
    def batches(self) -> int:
        """Batches that gave something."""

    def hangs(self, limit: float) -> bool:
        """Whether it has not moved for so long."""

    def start(self) -> None:
        """Start a thread in place of a dead one."""

    def replace(self) -> None:
        """Start a thread in place of a running one."""


@dataclass
class Watched:
    """One worker and what was done for it.

    Attributes:
        worker: a Batcher.
        encoder, tower: its names in logs and metrics.
        check: does a small piece of work by way of the worker; raises where that fails.
        before: called before a new thread is started in place of one that is gone or hangs.
        owner: whose worker it is.
        vital: whether the process is of no use without it; if not, the owner alone is given up.
        ailed: told of each restart, and of the end of them, with the reason.
        tries: starts in a row without a batch after them.
        batches: of the worker at the last start.
        due: when it may be started again (monotonic).
        suspect: it gave nothing but faults, and has not done anything since it was started anew.
    """

    worker: Worker
    encoder: str
    tower: str
    check: Callable[[], Awaitable[Any]]
    before: Callable[[], None] = lambda: None
    owner: object = None
    vital: Callable[[], bool] = lambda: True
    ailed: Callable[[str], None] = lambda why: None
    tries: int = 0
    batches: int = 0
    due: float = 0.0
    suspect: bool = False
    checking: asyncio.Task[None] | None = field(default=None, repr=False)


class Supervisor:
    """Looks after the workers of a process.

    Args:
        hang_seconds: without progress after which a worker hangs.
        restarts: in a row, after which it is given up.
        on_given_up: called once, with what to say.
    """

    def __init__(self, *, hang_seconds: float, restarts: int, on_given_up: Callable[[str], None]) -> None:
        self.hang_seconds = hang_seconds
        self.restarts = restarts
        self.given_up = ""
        self._on_given_up = on_given_up
        self._watched: list[Watched] = []
        self._decoder: Decoder | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()

    def watch(self, watched: Watched) -> None:
        """Look after one more worker, which runs."""
        self._watched.append(watched)

    def watch_decoder(self, decoder: Decoder) -> None:
        """Look after the decoder too: what hangs there is given up at once."""
        self._decoder = decoder

    def forget(self, owner: object) -> None:
        """Leave an owner's workers alone from now on: they are about to be stopped."""
        for one in [one for one in self._watched if one.owner is owner]:
            self._watched.remove(one)
            if one.checking is not None:
                one.checking.cancel()

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Look no more."""
        for task in [self._task, *(one.checking for one in self._watched)]:
            if task is not None:
                task.cancel()
        self._watched.clear()

    def ailing(self) -> list[str]:
        """Encoders of which a vital worker does not run or does not move."""
        return sorted({one.encoder for one in self._watched if one.vital() and self._ails(one)})

    def ails(self, owner: object) -> bool:
        """Whether a worker of this owner does not run or does not move."""
        return any(one.owner is owner and self._ails(one) for one in self._watched)

    def _ails(self, one: Watched) -> bool:
        worker = one.worker
        return not worker.alive or worker.failing or one.suspect or worker.hangs(self.hang_seconds)

    async def _run(self) -> None:
        while True:
            for one in list(self._watched):
                try:
                    self._look(one)
                except Exception:  # whatever it is: the others are looked after, and this one is looked at again
                    self._log.exception("a worker cannot be looked after", encoder=one.encoder, tower=one.tower)
            if self._decoder is not None and not self.given_up and self._decoder.hangs(self.hang_seconds):
                self._log.error("decoder given up", reason="hung")
                self._give_up(f"the decoder hangs: none of its threads has moved for {self.hang_seconds:g} s")
            await asyncio.sleep(_LOOK)

    def _look(self, one: Watched) -> None:
        if not one.worker.alive:
            self._restart(one, "died", one.worker.start)
        elif one.worker.hangs(self.hang_seconds):
            self._restart(one, "hung", one.worker.replace)
        elif one.tries and one.worker.batches > one.batches:
            self._log.info("worker recovered", encoder=one.encoder, tower=one.tower)
            one.tries, one.suspect = 0, False
        elif (one.worker.failing or one.suspect) and one.checking is None and time.monotonic() >= one.due:
            one.checking = asyncio.create_task(self._check(one))

    async def _check(self, one: Watched) -> None:
        """Ask a worker that gives only faults for something that cannot be at fault itself."""
        try:
            await asyncio.wait_for(one.check(), self.hang_seconds)
        except Overloaded:
            pass  # looked at again later
        except Exception:
            one.suspect = True
            self._restart(one, "fails", one.worker.replace)
        finally:
            one.checking = None

    def _give_up(self, text: str) -> None:
        self.given_up = text
        self._on_given_up(text)

    def _restart(self, one: Watched, why: str, start: Callable[[], None]) -> None:
        now = time.monotonic()
        if now < one.due or self.given_up:
            return
        if one.tries >= self.restarts:
            text = f"the {one.tower} worker of {one.encoder} {why} {one.tries + 1} times in a row"
            self._log.error("worker given up", encoder=one.encoder, tower=one.tower, reason=why, tries=one.tries)
            if one.vital():
                self._give_up(text)
            else:
                self.forget(one.owner)
                one.ailed(text)
            return
        self._log.error("worker restarted", encoder=one.encoder, tower=one.tower, reason=why, tries=one.tries)
        telemetry.WORKER_RESTARTS.labels(one.encoder, one.tower, why).inc()
        one.tries += 1
        one.due = now + _BACK_OFF[min(one.tries, len(_BACK_OFF) - 1)]
        one.batches = one.worker.batches
        one.before()
        try:
            start()
        except RuntimeError:  # the system has no thread left: it is tried again, and then given up
            self._log.exception("worker not restarted", encoder=one.encoder, tower=one.tower)
        one.ailed(f"the {one.tower} worker {why}")

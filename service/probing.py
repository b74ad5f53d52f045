"""Probes in progress: many at once, in pieces that fit between the batches of classifications.

A `Prober` belongs to one encoder and works in the thread of its image tower. Each of its steps is one forward and
backward of fixed size, or what one probe makes of its answers; between two of them a classification may go ahead, and a
probe that nobody waits for any more is dropped.
"""

from __future__ import annotations

import asyncio
import base64
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ironclip.encoder import Encoder
from ironclip.errors import IronclipError, NotReady, Overloaded
from ironclip.probe import Ask, Lane, Probe, Rows, adversarial, amplified, pieces, png, point, result, rows_for, run
from ironclip.probe.oracle import Piece
from ironclip.probe.report import clean
from service import telemetry
from service.errors import InternalError

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDS = ("done", "failed", "cancelled")
# (type, data): one event of a probe.
Event = tuple[str, dict[str, Any]]
# Probes that advance side by side in one encoder; more wait.
_ACTIVE = 16
# Between two events about the same probe at least so long, unless something broke.
_PAUSE = 0.05
# A point is told anew when its score has fallen by so much.
_WORTH_TELLING = 0.002


class Job:
    """One probe from its request to its end; its events are all there is to know of it.

    Args:
        build: makes the probe, in the worker's thread.
        loop: where its events are read.
        seconds: wall clock that it may take once it runs.
        artefacts: which of `adversarial` and `perturbation` are wanted.
        about: what the answer says of encoder, label set, defence and preprocessing.
        resized: whether the picture was not of the encoder's size.
    """

    def __init__(
        self,
        build: Callable[[], Probe],
        loop: asyncio.AbstractEventLoop,
        *,
        seconds: float,
        artefacts: tuple[str, ...] = (),
        about: dict[str, Any] | None = None,
        resized: bool = False,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.build = build
        self.seconds = seconds
        self.artefacts = artefacts
        self.about = about or {}
        self.resized = resized
        self.cancelled = False
        self.status: Status = "queued"
        self.events: list[Event] = []
        self.error: IronclipError | None = None
        self.probe: Probe | None = None
        self.started = 0.0
        self.deadline = math.inf  # of whoever waits, by the monotonic clock
        self._loop = loop
        self._changed = asyncio.Event()
        self._told: dict[float, tuple[str, float]] = {}
        self._best: float | None = None
        self._last = 0.0

    @property
    def overdue(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > min(self.started + self.seconds, self.deadline)

    @property
    def ended(self) -> bool:
        """Whether its last event has come."""
        return self.status in ENDS

    async def wait(self) -> None:
        """Return when it has ended."""
        async for _ in self.follow():
            pass

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """Its events from number ``after`` on, to the last."""
        while True:
            changed = self._changed
            while after < len(self.events):
                yield self.events[after]
                after += 1
            if self.ended:
                return
            await changed.wait()

    def emit(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._publish, kind, data)
        except RuntimeError:  # the loop is closed: nobody listens
            return

    def _publish(self, kind: str, data: dict[str, Any]) -> None:
        if self.ended:
            return
        self.events.append((kind, data))
        if kind in ENDS:
            self.status = kind  # type: ignore[assignment]
            telemetry.PROBES.labels(kind).inc()
        elif kind == "started":
            self.status = "running"
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # What follows is called in the worker's thread.

    def begin(self) -> None:
        """Build the probe: one forward of the clean picture."""
        self.started = time.monotonic()
        self.probe = probe = self.build()
        top = max(probe.options.eps) if probe.options.eps else probe.options.top
        names, label = probe.target.names, probe.aim.label
        told = {"clean": clean(probe), "unit": probe.options.unit, "max_eps": top}
        self.emit("started", {**told, "label": names[label] if names and label is not None else None})

    def tell(self) -> None:
        """Say what is new."""
        probe = self.probe
        assert probe is not None
        now, broken = time.monotonic(), probe.broken_at
        news = broken is not None and broken != self._best
        if now - self._last < _PAUSE and not news and not probe.done:
            return
        self._last = now
        for eps, lane in sorted(probe.lanes.items()):
            state, score = self._told.get(eps, ("", 2.0))
            if lane.state != state or lane.lowest < score - _WORTH_TELLING:
                self._told[eps] = (lane.state, lane.lowest)
                self.emit("point", point(probe, lane))
        elapsed = round(now - self.started, 3)
        known = {"robust_to": probe.robust_to, "broken_at": broken}
        self.emit("progress", {"gradients": probe.gradients, "elapsed": elapsed, **known})
        if news:
            self._best = broken
            if found := self._pictures():
                self.emit("artefacts", found)

    def finish(self) -> None:
        """Say everything."""
        probe = self.probe
        assert probe is not None
        self.tell()
        answer = {**result(probe, resized=self.resized), **self.about}
        answer["cost"]["seconds"] = round(time.monotonic() - self.started, 3)
        if found := self._pictures():
            answer["artefacts"] = found
        self.emit("done", answer)

    def fail(self, error: IronclipError, form: dict[str, Any]) -> None:
        """End it with an error, as a problem."""
        self.error = error
        self.emit("failed", {"error": form})

    def release(self) -> None:
        """Let go of pictures, attacks and Classifier: what is remembered of an ended probe is its events."""
        self.probe, self.build = None, _released

    def _pictures(self) -> dict[str, Any]:
        assert self.probe is not None
        found = adversarial(self.probe)
        if found is None or not self.artefacts:
            return {}
        eps, picture = found
        shown = {"adversarial": picture, "perturbation": amplified(picture, self.probe.picture)}
        return {"eps": eps, **{name: _uri(shown[name]) for name in self.artefacts}}


@dataclass
class _Round:
    """What is left to do until every probe has the answers it asked for."""

    pieces: deque[tuple[Piece, list[Job]]] = field(default_factory=deque)
    takes: deque[tuple[Job, list[tuple[Lane, Ask]]]] = field(default_factory=deque)


class Prober:
    """Runs the probes of one encoder; `Gaps` of its image batcher.

    Args:
        rows: of a batch; `measured_rows` found them.
        most: probes that may run and wait at most.
        wake: called when there is work.
        describe: makes a problem of an error.
    """

    def __init__(
        self, rows: Rows, *, most: int, wake: Callable[[], None], describe: Callable[[IronclipError], dict[str, Any]]
    ) -> None:
        self.rows = rows
        self.most = most
        self._wake, self._describe = wake, describe
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._beginning = 0
        self._active: list[Job] = []
        self._round = _Round()
        self._stopping = False
        self._log = telemetry.get_logger()

    @property
    def pending(self) -> bool:
        """Whether any probe runs or waits."""
        return bool(self._waiting or self._active)

    @property
    def running(self) -> int:
        """Probes that run or wait."""
        waiting = sum(not job.cancelled for job in list(self._waiting))
        return waiting + self._beginning + len(self._active)

    @property
    def backlog_seconds(self) -> float:
        """Until a probe that comes now is begun, at most."""
        return sum(job.seconds for job in list(self._waiting)) / _ACTIVE

    def submit(self, job: Job) -> None:
        """Take a probe on.

        Raises:
            Overloaded: too many run and wait.
            NotReady: stopping.
        """
        with self._lock:
            if self._stopping:
                raise NotReady("The service is stopping.")
            for gone in [one for one in self._waiting if one.cancelled]:
                self._waiting.remove(gone)
                gone.emit("cancelled", {})
            if self.running >= self.most:
                raise Overloaded(
                    f"{self.running} probes run and wait, at most {self.most} may (IRONCLIP_MAX_PROBES).",
                    retry_after=max(1.0, self.backlog_seconds),
                    limit=self.most,
                )
            self._waiting.append(job)
        self._wake()

    def stop(self) -> None:
        """End what runs with what is known, and what waits with an error; takes no more."""
        with self._lock:
            self._stopping = True
        self._wake()

    def step(self) -> None:
        """Do one piece."""
        try:
            self._step()
        except Exception:
            # Whose fault it is cannot be told: all that share the round end, the worker goes on.
            self._log.exception("a round of probes failed")
            jobs, self._active, self._round = self._active, [], _Round()
            for job in jobs:
                self._fail(job, _fault())

    def _step(self) -> None:
        work = self._round
        if self._stopping:
            self._end_all()
        elif work.pieces:
            piece, jobs = work.pieces.popleft()
            # Nobody waits for it any more, or the time is up: its answers would be thrown away.
            if not all(job.cancelled or job.overdue for job in jobs):
                run(piece)
                telemetry.PROBE_STEPS.inc(len(piece.asks))
        elif work.takes:
            job, answered = work.takes.popleft()
            self._guarded(job, lambda: self._take(job, answered))
        elif self._waiting and len(self._active) < _ACTIVE:
            self._admit()
        else:
            self._begin_round()

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
            job.release()
        return going

    def _admit(self) -> None:
        with self._lock:
            job = self._waiting.popleft()
            self._beginning = 1  # it counts all the time
        try:
            if self._guarded(job, lambda: self._begin(job)):
                self._active.append(job)
        finally:
            self._beginning = 0

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
        owners: dict[int, Job] = {}
        asked: list[Ask] = []

        def ask(job: Job) -> bool:
            assert job.probe is not None
            asks = job.probe.asks()
            self._round.takes.append((job, asks))
            for _, one in asks:
                owners[id(one)] = job
                asked.append(one)
            return True

        for job in list(self._active):
            self._guarded(job, lambda job=job: ask(job))  # type: ignore[misc]
        for piece in pieces(asked, self.rows):
            self._round.pieces.append((piece, [owners[id(one)] for one in piece.asks]))

    def _take(self, job: Job, answered: list[tuple[Lane, Ask]]) -> bool:
        probe = job.probe
        assert probe is not None
        if job.cancelled:
            job.emit("cancelled", {})
            return False
        if job.overdue:  # some of its pieces may have been left out
            probe.stop("seconds")
        else:
            probe.take(answered)
        if probe.done:
            job.finish()
        else:
            job.tell()
        return not probe.done

    def _end_all(self) -> None:
        jobs, self._round = list(self._active), _Round()
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()

        def end(job: Job) -> bool:
            assert job.probe is not None
            job.probe.stop("cancelled")
            job.finish()
            return False

        for job in jobs:
            self._guarded(job, lambda job=job: end(job))  # type: ignore[misc]
        for job in waiting:
            self._fail(job, NotReady("The service is stopping."))

    def _fail(self, job: Job, error: IronclipError) -> None:
        job.fail(error, self._describe(error))


def measured_rows(encoder: Encoder, quantum: float) -> tuple[Rows, float]:
    """The largest batch whose forward and backward stay within the quantum (one row if none does), and their seconds.

    Args:
        encoder: that gradients are taken of.
        quantum: seconds.
    """
    best = rows_for(encoder.device)
    for size in [size for size in (32, 16, 8, 4, 2, 1) if size <= best.gradient]:
        seconds = min(_timed(encoder, size) for _ in range(3))
        if seconds <= quantum or size == 1:
            break
    return Rows(size, min(best.forward, size)), seconds


def _timed(encoder: Encoder, size: int) -> float:
    side = encoder.resolution
    with torch.enable_grad():
        pixels = torch.zeros(size, 3, side, side, device=encoder.device, requires_grad=True)
        began = time.perf_counter()
        torch.autograd.grad(encoder.encode_image(pixels).sum(), pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - began


def _fault() -> InternalError:
    return InternalError("Something went wrong in the service; its log has it.")


def _released() -> Probe:
    raise RuntimeError("the probe has ended")


def _uri(picture: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")

"""One probe from its request to its end, and the events that tell of it."""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ironclip.errors import IronclipError
from ironclip.probe import Probe, adversarial, amplified, png, point, result
from ironclip.probe.report import clean
from service import telemetry
from service.tracing import CURRENT, Attributes, Span, place

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDS = ("done", "failed", "cancelled")
_LOG = telemetry.get_logger()
# Between two events about the same probe at least so long, unless something broke.
_PAUSE = 0.05
# A point is told anew when its score has fallen by so much.
_WORTH_TELLING = 0.002
_SMALL = 16 * 1024  # bytes of a probe's events beside its pictures, about


def new_id() -> str:
    """An id for a probe."""
    return uuid.uuid4().hex


class Event(NamedTuple):
    """One event: its number in order, type, and data."""

    number: int
    kind: str
    data: dict[str, Any]

    @property
    def about(self) -> str:
        """What it speaks of: a later event about the same takes its place."""
        return f"point {self.data.get('eps')}" if self.kind == "point" else self.kind


class Job:
    """One probe from its request to its end; its events are all there is to know of it.

    Kept are the last events about each thing, so that a long probe takes no more memory than a short one; numbers go
    on, and whoever follows it as it goes gets every event.

    Args:
        build: makes the probe, in the worker's thread.
        loop: where its events are read.
        seconds: wall clock that it may take once it runs.
        artefacts: which of `adversarial` and `perturbation` are wanted.
        about: what the answer says of encoder, label set, defence and preprocessing.
        resized: whether the picture was not of the encoder's size.
        tenant: whose it is; "" where there are no API keys.
        identity: its id; a new one if not given.
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
        tenant: str = "",
        identity: str = "",
    ) -> None:
        self.tenant = tenant
        self.id = identity or new_id()
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
        self.gradients = self.passes = 0  # it has taken, when it has ended
        self.started = 0.0
        self.deadline = math.inf  # of whoever waits, by the monotonic clock
        self.pieces, self.busy = 0, 0.0  # of its work, and the seconds that they took; shared ones in part
        self._sharers, self._piece_began = 1, 0.0
        self._place, trace = place(), CURRENT.get()
        self._trace_id = trace.context.trace_id if trace is not None else ""
        self._queued = time.perf_counter()
        self._begun = 0.0
        self._loop = loop
        self._changed = asyncio.Event()
        self._count = 0
        self._told: dict[float, tuple[str, float]] = {}
        self._best: float | None = None
        self._shown: dict[str, Any] = {}  # the last pictures, which an answer and an event share
        self._last = 0.0

    @property
    def overdue(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > min(self.started + self.seconds, self.deadline)

    @property
    def ended(self) -> bool:
        """Whether its last event has come."""
        return self.status in ENDS

    @property
    def size(self) -> int:
        """About the bytes that its events take, nearly all of them pictures; what two of them share counts once."""
        told = (event.data.get("artefacts") if event.kind == "done" else event.data for event in self.events)
        texts = {id(value): value for data in told if data for value in data.values() if isinstance(value, str)}
        return _SMALL + sum(len(text) for text in texts.values())

    async def wait(self) -> None:
        """Return when it has ended."""
        async for _ in self.follow():
            pass

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """Its events from number ``after`` on, to the last."""
        while True:
            changed = self._changed
            newer = [one for one in self.events if one.number >= after]
            for event in newer:
                yield event
                after = event.number + 1
            # While one was told, another may have come: the last look finds nothing.
            if newer:
                continue
            if self.ended:
                return
            await changed.wait()

    def emit(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event, from any thread."""
        if kind in ENDS:
            self.piece_ends()
            if self.probe is not None:
                self.gradients, self.passes = self.probe.gradients, self.probe.passes
        try:
            self._loop.call_soon_threadsafe(self._publish, kind, data)
        except RuntimeError:  # the loop is closed: nobody listens
            return

    def _publish(self, kind: str, data: dict[str, Any]) -> None:
        if self.ended:
            return
        event = Event(self._count, kind, data)
        self._count += 1
        self.events = [one for one in self.events if one.about != event.about] + [event]
        if kind in ENDS:
            self.status = kind  # type: ignore[assignment]
            telemetry.PROBES.labels(kind).inc()
            if kind == "done":
                telemetry.PROBE_FLIPS.labels(data["norm"], telemetry.flip_bucket(data["norm"], data["broken_at"])).inc()
            self._note()
            told = {"code": self.error.code} if self.error is not None else {}
            traced = {"trace_id": self._trace_id} if self._trace_id else {}
            _LOG.info("probe ended", probe=self.id, outcome=kind, gradients=self.gradients, **traced, **told)
        elif kind == "started":
            self.status = "running"
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _note(self) -> None:
        """Tell the request's trace: the wait, and the probe with its pieces summed up."""
        if self._place is None:
            return
        trace, stage = self._place
        now = time.perf_counter()
        trace.note(Span("queue", self._queued, self._begun or now, stage))
        if self._begun:
            about: Attributes = {
                "ironclip.probe": self.id,
                "ironclip.outcome": self.status,
                "ironclip.pieces": self.pieces,
                "ironclip.busy_ms": round(1000 * self.busy, 3),
                "ironclip.gradients": self.gradients,
            }
            trace.note(Span("probe", self._begun, now, stage, about))

    # What follows is called in the worker's thread.

    def piece_begins(self, sharers: int) -> None:
        """Count a piece of work, done for so many probes at once."""
        self.pieces += 1
        self._sharers, self._piece_began = sharers, time.perf_counter()

    def piece_ends(self) -> None:
        """Count this probe's part of the piece's time; once."""
        if self._piece_began:
            self.busy += (time.perf_counter() - self._piece_began) / self._sharers
            self._piece_began = 0.0

    def begin(self) -> None:
        """Build the probe: one forward of the clean picture."""
        self.started = time.monotonic()
        self._begun = time.perf_counter()
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
        """End it with an error, as a problem; the first stays, whatever else comes of it in an abandoned thread."""
        self.error = self.error or error
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
        if self._shown.get("eps") == eps:
            return self._shown
        shown = {"adversarial": picture, "perturbation": amplified(picture, self.probe.picture)}
        self._shown = {"eps": eps, **{name: _uri(shown[name]) for name in self.artefacts}}
        return self._shown


def _released() -> Probe:
    raise RuntimeError("the probe has ended")


def _uri(picture: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")

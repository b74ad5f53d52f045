"""The W3C trace context of a request, and what the request's time was spent on, for OpenTelemetry.

Nothing here knows OpenTelemetry: spans are noted as they end, in plain lists, and handed to an exporter
(service/otel.py) when the request is answered. Where none is configured, or the trace is not sampled, nothing is noted.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Attributes = Mapping[str, str | int | float | bool]

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE_KEY = r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_STATE_MEMBER = re.compile(rf"({_STATE_KEY})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e])")
_STATE_CHARS, _STATE_MEMBERS = 512, 32
_SAMPLED, _RANDOM = 1, 2
# Not the caller's to predict, and no secret either; `random` takes its seed from the system.
_IDS = random.Random()


class Context(NamedTuple):
    """Where a request stands in a trace: ids as lower-case hex, flags as W3C has them, `tracestate` as it came."""

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether whoever began the trace records it."""
        return bool(self.flags & _SAMPLED)

    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def read_context(parents: Sequence[str], states: Sequence[str]) -> Context | None:
    """The context in a request's `traceparent` and `tracestate` headers; None where there is none that is valid.

    A state that is not valid is dropped alone, as W3C says.
    """
    found = _PARENT.fullmatch(parents[0].strip()) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Context(trace_id, span_id, int(flags, 16) & (_SAMPLED | _RANDOM), _read_state(states))


def _read_state(states: Sequence[str]) -> str:
    members = [member.strip(" \t") for state in states for member in state.split(",")]
    members = [member for member in members if member]
    matches = [_STATE_MEMBER.fullmatch(member) for member in members]
    keys = [match[1] for match in matches if match is not None]
    text = ",".join(members)
    if len(keys) != len(members) or len(set(keys)) != len(keys):
        return ""
    return text if len(text) <= _STATE_CHARS and len(members) <= _STATE_MEMBERS else ""


@dataclass(eq=False)
class Span:
    """A part of a request's time; `start` and `end` by `time.perf_counter`.

    Attributes:
        parent: the part that it is part of; None: the request.
        link: what the exporter gave for a batch that this was done in.
    """

    name: str
    start: float
    end: float = 0.0
    parent: Span | None = None
    attributes: Attributes = field(default_factory=dict)
    link: Any = None


class Recorder(Protocol):
    """What an exporter does for one request that is recorded."""

    def part(self, span: Span) -> None:
        """Tell of a span that ended after its request, or at its end."""

    def end(self, name: str, spans: Sequence[Span], attributes: Attributes, failed: bool) -> None:
        """Tell of the request and of its parts, those that contain others first."""

    def batch(self, name: str, start: float, end: float, attributes: Attributes, requests: Sequence[Recorder]) -> Any:
        """Tell of a batch that these requests had items in; returns a link to it."""


class Exporter(Protocol):
    """Where traces go."""

    def begin(self, given: Context | None) -> tuple[Context, Recorder | None]:
        """Begin a request: its own context, and what takes its spans if it is recorded."""

    def close(self) -> None:
        """Send what is left, within a short time."""


class Trace:
    """One request in its trace.

    Args:
        given: the context that came with it.
        exporter: where it is told to; None: nowhere.

    Attributes:
        context: its own, for the answer.
        recorder: None where nothing is recorded.
    """

    __slots__ = ("_ended", "_spans", "context", "recorder")

    def __init__(self, given: Context | None, exporter: Exporter | None = None) -> None:
        self.recorder: Recorder | None = None
        if exporter is not None:
            self.context, self.recorder = exporter.begin(given)
        else:
            trace_id = given.trace_id if given is not None else f"{_IDS.getrandbits(128) or 1:032x}"
            flags, state = (given.flags, given.state) if given is not None else (_RANDOM, "")
            self.context = Context(trace_id, f"{_IDS.getrandbits(64) or 1:016x}", flags, state)
        self._spans: list[Span] = []
        self._ended = False

    def note(self, span: Span) -> None:
        """Keep a span that has ended; any thread may call this, after the request's end too."""
        if self._ended:
            if self.recorder is not None:
                self.recorder.part(span)
        else:
            self._spans.append(span)

    def end(self, name: str, attributes: Attributes, *, failed: bool) -> None:
        """Hand everything over; a second call does nothing."""
        if self.recorder is None or self._ended:
            return
        self._ended = True
        self.recorder.end(name, sorted(self._spans, key=lambda span: (span.start, -span.end)), attributes, failed)
        self._spans = []


class Place(NamedTuple):
    """Where in a trace something is asked for."""

    trace: Trace
    stage: Span | None


CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
_STAGE: ContextVar[Span | None] = ContextVar("stage", default=None)


def place() -> Place | None:
    """Where the calling task is, or None where nothing is recorded."""
    trace = CURRENT.get()
    return Place(trace, _STAGE.get()) if trace is not None and trace.recorder is not None else None


@contextmanager
def stage(trace: Trace, name: str) -> Iterator[None]:
    """Note a block as a part of a recorded request; what is queued within becomes a part of it."""
    span = Span(name, time.perf_counter())
    token = _STAGE.set(span)
    try:
        yield
    finally:
        _STAGE.reset(token)
        span.end = time.perf_counter()
        trace.note(span)


def note_batch(name: str, waits: Sequence[tuple[Place, float]], cost: int, began: float, seconds: float) -> None:
    """Note one batch of the model: a span of its own, and in each request the wait for it and the pass itself.

    Args:
        name: of the worker.
        waits: for each item of a recorded request, its place and when it was queued.
        cost: of the whole batch, in items.
        began: when the batch was run.
        seconds: that it took.
    """
    first: dict[int, tuple[Place, float, int]] = {}
    for where, queued in waits:
        _, earliest, items = first.get(id(where.trace), (where, queued, 0))
        first[id(where.trace)] = (where, min(earliest, queued), items + 1)
    recorders = [where.trace.recorder for where, _, _ in first.values() if where.trace.recorder is not None]
    if not recorders:
        return
    end = began + seconds
    about: Attributes = {"ironclip.worker": name, "ironclip.items": cost}
    link = recorders[0].batch("batch", began, end, about, recorders)
    for where, queued, items in first.values():
        where.trace.note(Span("queue", queued, began, where.stage))
        mine: Attributes = {"ironclip.worker": name, "ironclip.items": items, "ironclip.batch_items": cost}
        where.trace.note(Span("forward", began, end, where.stage, mine, link))

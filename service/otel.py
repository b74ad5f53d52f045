"""Traces to an OpenTelemetry collector over OTLP/HTTP; imported only where one is configured.

Everything that may be set is set by OpenTelemetry's own variables (endpoint, headers, sampler, resource), which its
SDK reads. Spans are sent by a thread of its own, from a bounded queue: a collector that is slow or away costs
spans, never requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context as NoContext
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from ironclip import __version__
from service import telemetry
from service.tracing import Attributes, Context, Recorder, Span

_CLOSE_SECONDS = 3.0


class OtelExporter:
    """Traces over OTLP, as OpenTelemetry's variables say."""

    def __init__(self) -> None:
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "ironclip"}))
        # Its own lines say of each try that it failed; ours say it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        processor = BatchSpanProcessor(_Watched(OTLPSpanExporter()))
        self._requests = TracerProvider(resource=resource, shutdown_on_exit=False)
        # A batch is recorded where one of its requests is: the sampler has said so already.
        self._batches = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
        for provider in (self._requests, self._batches):
            provider.add_span_processor(processor)
        self._processor = processor
        self._tracer = self._requests.get_tracer("ironclip.service", __version__)
        self._batch_tracer = self._batches.get_tracer("ironclip.service", __version__)

    def begin(self, given: Context | None) -> tuple[Context, Recorder | None]:
        """Begin a request; the sampler, which by default does as the caller says, decides whether it is recorded."""
        parent = set_span_in_context(NonRecordingSpan(_remote(given))) if given is not None else None
        root = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        own = root.get_span_context()
        flags = (given.flags & ~1 if given is not None else 0) | int(own.trace_flags)
        context = Context(
            f"{own.trace_id:032x}", f"{own.span_id:016x}", flags, given.state if given is not None else ""
        )
        return context, _Recorder(root, self._tracer, self._batch_tracer) if root.is_recording() else None

    def close(self) -> None:
        """Send what is left, for three seconds at most."""
        ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(_CLOSE_SECONDS)


class _Recorder:
    """The spans of one request."""

    def __init__(self, root: api.Span, tracer: api.Tracer, batches: api.Tracer) -> None:
        self.root = root
        self._tracer, self._batches = tracer, batches
        self._offset = time.time() - time.perf_counter()
        self._made: dict[int, api.Span] = {}

    def part(self, span: Span) -> None:
        """Tell of one span."""
        parent = self._made.get(id(span.parent), self.root)
        links = [Link(span.link)] if span.link is not None else None
        made = self._tracer.start_span(
            span.name,
            set_span_in_context(parent),
            attributes=span.attributes,
            links=links,
            start_time=self._time(span.start),
        )
        self._made[id(span)] = made
        made.end(self._time(span.end))

    def end(self, name: str, spans: Sequence[Span], attributes: Attributes, failed: bool) -> None:
        """Tell of the request and its parts."""
        for span in spans:
            self.part(span)
        self._made = {}
        self.root.update_name(name)
        self.root.set_attributes(dict(attributes))
        if failed:
            self.root.set_status(Status(StatusCode.ERROR))
        self.root.end()

    def batch(self, name: str, start: float, end: float, attributes: Attributes, requests: Sequence[Recorder]) -> Any:
        """Tell of a batch: a trace of its own, linked to the requests' spans."""
        links = [Link(one.root.get_span_context()) for one in requests if isinstance(one, _Recorder)]
        made = self._batches.start_span(
            name, NoContext(), attributes=attributes, links=links, start_time=self._time(start)
        )
        made.end(self._time(end))
        return made.get_span_context()

    def _time(self, moment: float) -> int:
        return int((moment + self._offset) * 1e9)


class _Watched(SpanExporter):
    """An exporter whose failures are counted, and said when they begin and end."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failing = False
        self._log = telemetry.get_logger()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        try:
            result = self._exporter.export(spans)
        except Exception:
            result = SpanExportResult.FAILURE
        failed = result is not SpanExportResult.SUCCESS
        telemetry.TRACE_SPANS.labels("failed" if failed else "sent").inc(len(spans))
        if failed and not self._failing:
            self._log.warning("traces cannot be sent; spans are dropped until they can")
        elif self._failing and not failed:
            self._log.info("traces are sent again")
        self._failing = failed
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back here."""
        return True


def _remote(given: Context) -> SpanContext:
    state = TraceState.from_header([given.state]) if given.state else None
    flags = TraceFlags(given.flags & 1)
    return SpanContext(int(given.trace_id, 16), int(given.span_id, 16), True, flags, state)

"""A stand-in for an OpenTelemetry collector: takes what the exporter really sends over HTTP, as protobuf."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Listens on loopback; keeps the spans.

    Attributes:
        spans: that came, in order.
        resource: attributes of the last sender.
    """

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fine = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                self.send_response(200 if fine else 400)
                self.send_header("Content-Length", "0")
                self.end_headers()
                if fine:
                    collector.take(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, body: bytes) -> None:
        for part in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = {one.key: one.value.string_value for one in part.resource.attributes}
            for scope in part.scope_spans:
                self.spans.extend(scope.spans)

    def wait(self, fits: Callable[[list[Any]], bool], seconds: float = 15) -> list[Any]:
        """The spans, once they fit."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if fits(self.spans):
                return list(self.spans)
            time.sleep(0.05)
        raise AssertionError(f"the spans did not come; there are {[span.name for span in self.spans]}")

    def of(self, trace_id: str, name: str) -> list[Any]:
        """The spans of a trace, once one of this name has come (the request's own is the last)."""
        wanted = bytes.fromhex(trace_id)
        spans = self.wait(lambda all: any(s.name == name for s in all if s.trace_id == wanted))
        return [span for span in spans if span.trace_id == wanted]

    def close(self) -> None:
        """Be away; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}

"""A gateway between a client and a service that passes on, answers by itself, hangs up or cuts streams, as told."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        status: answered with this, and the request not passed on; 0 passes it on.
        headers: of that answer.
        body: of that answer.
        hang_up: the connection is closed without an answer; "before" or "after" the service has had the request.
        cut: a stream that is passed on ends after so many events.
        clean: whether the cut looks like a proper end.
        path: only requests with this in their path.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang_up: str = ""
    cut: int = 0
    clean: bool = False
    path: str = ""


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    at: float


class Gateway:
    """What is to go wrong with the next requests, in order, and what has been asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.faults: deque[Fault] = deque()
        self.seen: list[Seen] = []

    def asked(self, method: str, path: str = "") -> list[Seen]:
        """The requests of a method with this in their path."""
        return [one for one in self.seen if one.method == method and path in one.path]

    def next_fault(self, path: str) -> Fault:
        if self.faults and self.faults[0].path in path:
            return self.faults.popleft()
        return Fault()


@contextlib.contextmanager
def serving(upstream: int) -> Iterator[Gateway]:
    """A gateway before the service of that port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            gateway.seen.append(Seen(self.command, self.path, headers, time.monotonic()))
            fault = gateway.next_fault(self.path)
            self.close_connection = bool(fault.hang_up)
            if fault.hang_up == "before":
                return
            if fault.status:
                self.send_response(fault.status)
                for name, value in {"Content-Length": str(len(fault.body)), **fault.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(fault.body)
                return
            line = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            try:
                line.request(self.command, self.path, body, {**headers, "connection": "close"})
                answer = line.getresponse()
                if fault.hang_up:
                    answer.read()
                else:
                    self._answer(answer, fault)
            finally:
                line.close()

        def _answer(self, answer: http.client.HTTPResponse, fault: Fault) -> None:
            length = answer.headers.get("Content-Length")
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            chunked = length is None and answer.status not in (204, 304)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events = 0
            while part := answer.read1(65536):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                events += part.count(b"\n\n")
                if fault.cut and events >= fault.cut:
                    if fault.clean:
                        self.wfile.write(b"0\r\n\r\n")
                    self.close_connection = True
                    return
            if chunked:
                self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PUT = do_DELETE = _pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    gateway = Gateway(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield gateway
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

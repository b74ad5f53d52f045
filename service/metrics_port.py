"""`/metrics` on a port of its own, for a scraper that has no API key: the network says who reaches it.

It is served from a thread, so that it answers even while the event loop does not.
"""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

_TIMEOUT = 10.0  # of one connection, seconds


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "ironclip", ""
    timeout = _TIMEOUT

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"There is only /metrics here.\n", "text/plain; charset=utf-8")
            return
        self._answer(HTTPStatus.OK, generate_latest(), CONTENT_TYPE_LATEST)

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the standard library's line holds the path as it was typed."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away."""


class MetricsPort:
    """A listener that serves `/metrics` and nothing else.

    Args:
        host: as the service's own.
        port: not the service's own.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        (family, *_, address), *_ = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        server = type("_Bound", (_Server,), {"address_family": family})
        self._server: _Server = server(address[:2], _Handler)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

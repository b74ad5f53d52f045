"""What a connection may do before there is a request that could be refused: uvicorn's protocol, with bounds.

uvicorn's parser takes a head of any length, a piece at a time, joins a growing value by copying it, and waits for ever
for the rest. Here bytes that come to nothing (the head, trailers, the extensions of chunks) are bounded, and so is the
time that a head takes. So is the time in which a client takes nothing of its answer: closing a connection waits for
what is still to be sent, and so would hold it for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

from service import telemetry


def open_files() -> int:
    """Files that this process may have open at once, a million where nothing limits them."""
    with contextlib.suppress(ImportError):  # it is POSIX's
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY:
            return min(most, 1 << 20)
    return 1 << 20


def unsent(transport: Any) -> int:
    """Bytes that the other side has not taken: the transport's, and the kernel's, which makes room by the megabyte."""
    left = int(transport.get_write_buffer_size())
    with contextlib.suppress(ImportError, OSError):  # where it cannot be told, the transport's alone
        import fcntl
        import termios

        told = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        left += int.from_bytes(told, sys.byteorder)
    return left


try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # uvicorn then takes h11, which has a bound of its own
    HTTP: Any = "auto"
else:

    class GuardedProtocol(HttpToolsProtocol):
        """One connection.

        Attributes:
            most_quiet: bytes in which no head ends and no body goes on.
            patience: seconds for a head, from its first byte on; and for the rest of a body whose request has been
                answered.
            patience_to_write: seconds in which some of an answer has to be taken; one that is being closed may have
                twice as many.
            most_connections: more are answered 503 at once.
        """

        most_quiet = 64 * 1024
        patience = 20.0
        patience_to_write = 60.0
        # The rest of the files that this process may open is for pictures, Redis and what is fetched.
        most_connections = max(64, open_files() - 256)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._quiet = 0
            self._heard = self._begun = self._in_head = False
            self._timer: asyncio.TimerHandle | None = None
            self._watcher: asyncio.TimerHandle | None = None
            self._waiting = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()
            if len(self.connections) > self.most_connections:
                telemetry.REFUSED.labels("connections").inc()
                self._refuse(b"503 Service Unavailable", b"Too many connections.", b"retry-after: 1\r\n")
            else:
                # As long as between two requests: whoever connects ahead of its first one is not told that it is late.
                self._be_patient(self.timeout_keep_alive)

        def connection_lost(self, exc: Exception | None) -> None:
            self._be_easy()
            if self._watcher is not None:
                self._watcher.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._waiting = 0

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._heard = False
            super().data_received(data)
            if self._in_head:  # not where it begins: most heads come whole, and need no timer
                self._be_patient(self.patience)
            self._quiet = 0 if self._heard else self._quiet + len(data)
            if self._quiet > self.most_quiet:
                self._refuse(b"431 Request Header Fields Too Large", b"The headers are too large.")
            self._mind_idleness()

        def on_message_begin(self) -> None:
            self._heard = self._begun = self._in_head = True
            super().on_message_begin()
            self._be_easy()

        def on_headers_complete(self) -> None:
            self._heard, self._in_head = True, False
            self._be_easy()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._heard = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._heard, self._begun = True, False
            self._be_easy()
            super().on_message_complete()
            if self.cycle is not None:
                self.cycle.more_body = False  # also where it has been answered without its body

        def on_response_complete(self) -> None:
            unread = self.cycle is not None and self.cycle.response_complete and self.cycle.more_body
            super().on_response_complete()
            if unread and not self.transport.is_closing():
                self._be_patient(self.patience)

        def _be_patient(self, seconds: float) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self._too_late)

        def _mind_idleness(self) -> None:
            """After bytes that no answer will follow: they stopped uvicorn's timer, which starts with answers alone."""
            answered = self.cycle is None or self.cycle.response_complete
            if answered and not self._begun and not self.transport.is_closing() and not self.timeout_keep_alive_task:
                self._be_patient(self.timeout_keep_alive)

        def _be_easy(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_late(self) -> None:
            self._timer = None
            if self._begun:
                self._refuse(b"408 Request Timeout", b"The request did not arrive in time.")
            else:
                self.transport.close()

        def _watch(self) -> None:
            """Look again after a while at what waits to be sent, where nothing is added to it meanwhile."""
            if self._watcher is not None:
                self._watcher.cancel()
            stuck = self.flow.write_paused or self.transport.is_closing()
            self._waiting = unsent(self.transport) if stuck else 0
            self._watcher = self.loop.call_later(self.patience_to_write, self._look)

        def _look(self) -> None:
            if 0 < self._waiting <= unsent(self.transport):
                self.transport.abort()
            else:
                self._watch()

        def _refuse(self, status: bytes, text: bytes, headers: bytes = b"") -> None:
            """Say why, unless an answer is on its way already, and close."""
            if self.transport.is_closing():
                return
            if self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body):
                self.transport.write(
                    b"HTTP/1.1 %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
                    b"%sconnection: close\r\n\r\n%s" % (status, len(text), headers, text)
                )
            self.transport.close()

    HTTP = GuardedProtocol

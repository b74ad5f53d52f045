"""One request and its answer, on their way through the service's front: see `service.front`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from service.request_ids import new_request_id
from service.telemetry import Stages
from service.tracing import Exporter, Trace, read_context
from service.versions import Held

if TYPE_CHECKING:
    from service.bodies import Body
    from service.rate_limits import Meter

ENCODER_HEADER = "X-Ironclip-Encoder"
_ENCODER_HEADER = ENCODER_HEADER.lower().encode()
_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._-]{8,128}$")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class Exchange:
    """What is known of a request, and the two ends that the routes get: every body byte and every answer passes here.

    Args:
        scope, receive, send: as the server gives them; the routes get `scope` of this object, in which HEAD is a GET.
        closing: whether the connection ends with the answer, asked when that begins.
        traces: where traces go; None: nowhere.

    Attributes:
        fields: the first value of each header, by its name in lower case.
        body: what its bytes count against, once it is known who asks.
        meter: what it is paid with, likewise.
        status: of the answer; 0 before it begins.
    """

    __slots__ = (
        "_again",
        "_checked",
        "_closing",
        "_head",
        "_receive",
        "_send",
        "_told",
        "body",
        "fields",
        "held",
        "meter",
        "request_id",
        "scope",
        "stages",
        "start",
        "state",
        "status",
        "trace",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, closing: Callable[[], bool], traces: Exporter | None
    ) -> None:
        self.start = time.perf_counter()
        self._head = scope["method"] == "HEAD"
        self.scope = {**scope, "method": "GET"} if self._head else scope
        self._receive, self._send, self._closing = receive, send, closing
        self.fields: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        given = self.fields.get(b"x-request-id")
        self.request_id = given.decode() if given is not None and _REQUEST_ID.match(given) else new_request_id()
        parent = None
        if b"traceparent" in self.fields:
            asked = Headers(scope=scope)
            parent = read_context(asked.getlist("traceparent"), asked.getlist("tracestate"))
        self.trace = Trace(parent, traces)
        self.stages = Stages(self.trace)
        self.held = Held(self.request_id)
        if self.scope["method"] == "POST":  # the others look at an encoder
            self.held.status = 500  # what an answer that never begins becomes
        self.state: dict[str, Any] = self.scope.setdefault("state", {})
        self.state.update(request_id=self.request_id, stages=self.stages, error_code=None)
        self.body: Body | None = None
        self.meter: Meter | None = None
        self.status = 0
        self._checked = False
        self._again: bytes | None = None
        self._told = False  # all that a HEAD is told

    def read_again(self, body: bytes) -> None:
        """Let the body, which has been read, be told once more to whoever reads it."""
        self._again = body

    async def receive(self) -> Message:
        """As ASGI's `receive`; what has arrived counts.

        Raises:
            ContentEncodingUnsupported, InputTooLarge, Overloaded: where the body is read, so that the refusal has the
                shape of the route's other errors.
        """
        if self._told:
            return {"type": "http.disconnect"}
        # Not before it is known who asks, and nobody reads before that.
        assert self.body is not None
        if self._again is not None:
            body, self._again = self._again, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._checked:
            self._checked = True
            self.body.check(self.fields)
        message = await self._receive()
        if message["type"] == "http.request":
            self.body.hold(len(message.get("body", b"")))
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's `send`; the answer gets what every answer has.

        That to a HEAD ends with its head, and whoever goes on is told that nobody listens: a stream of events would
        keep the connection, and the next request on it, until its own end.
        """
        if message["type"] == "http.response.start":
            status = message["status"]
            if status == 405:
                _allow_head(message)
            headers = [*message.get("headers", ()), *self._about()]
            if self.meter is not None and self.meter.limited:
                limits = await self.meter.headers()
                headers += [(name.lower().encode(), value.encode()) for name, value in limits.items()]
            message["headers"] = headers
            # Last: an answer whose headers cannot be made has not begun.
            self.status = status
            if self.held.status:
                self.held.status = status
        elif self._told:
            return
        await self._send(message)
        if self._head and message["type"] == "http.response.start":
            self._told = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _about(self) -> list[tuple[bytes, bytes]]:
        """The headers of every answer; none of them comes from a route, so nothing is looked for before."""
        context = self.trace.context
        about = [
            (b"x-request-id", self.request_id.encode()),
            _NO_SNIFFING,
            (b"traceparent", context.header().encode()),
        ]
        if context.state:
            about.append((b"tracestate", context.state.encode()))
        if versions := self.held.versions:
            about.append((_ENCODER_HEADER, ", ".join(f"{one.name}@{one.digest}" for one in versions).encode()))
        if self._closing():
            about.append((b"connection", b"close"))  # or the next request would meet a closed connection
        if self.stages.seconds:
            about.append((b"server-timing", self.stages.header().encode()))
        return about


def _allow_head(message: Message) -> None:
    """HEAD is answered wherever GET is (RFC 9110, section 9.3.2), and said to be."""
    headers = MutableHeaders(scope=message)
    allowed = [method.strip() for method in headers.get("allow", "").split(",")]
    if "GET" in allowed and "HEAD" not in allowed:
        headers["Allow"] = ", ".join([*allowed, "HEAD"])

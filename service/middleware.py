"""Layers around the routes, in plain ASGI: accounts for each request, guards its body, and answers HEAD."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ironclip.errors import InputTooLarge, Overloaded
from service import telemetry
from service.errors import ContentEncodingUnsupported, InternalError, error_response
from service.telemetry import Stages

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{8,128}$")
# Routes asked by machines every few seconds: they are counted, and logged at debug.
QUIET = frozenset({"livez", "readyz", "metrics"})


class Accounting:
    """Give each request an id, time it, count it, log it, and turn a fault of ours into a 500 problem.

    Args:
        app: the layers below.
        ops: names of the endpoint functions that may become a metric's label; others count as "other".
    """

    def __init__(self, app: ASGIApp, ops: frozenset[str]) -> None:
        self.app = app
        self.ops = ops
        self.log = telemetry.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        stages = Stages()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, stages=stages, error_code=None)
        status = 0

        async def send_accounted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if stages.seconds:
                    headers["Server-Timing"] = stages.header()
            await send(message)

        start = time.perf_counter()
        telemetry.IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, send_accounted)
        except Exception:
            self.log.exception("fault", request_id=request_id, op=self._op(scope))
            state["error_code"] = InternalError.code
            if status:
                raise  # the answer has begun: only breaking it off tells the caller
            fault = InternalError("Something went wrong in the service; its log has it under this request id.")
            await error_response(fault, scope["path"], request_id)(scope, receive, send_accounted)
        finally:
            telemetry.IN_FLIGHT.dec()
            self._account(scope, status, time.perf_counter() - start, stages)

    def _account(self, scope: Scope, status: int, seconds: float, stages: Stages) -> None:
        op, state = self._op(scope), scope["state"]
        telemetry.REQUESTS.labels(op, str(status)).inc()
        telemetry.REQUEST_SECONDS.labels(op).observe(seconds)
        stages.observe()
        code = state["error_code"]
        if code:
            telemetry.ERRORS.labels(code).inc()
        write = self.log.debug if op in QUIET else self.log.info
        write(
            "request",
            request_id=state["request_id"],
            op=op,
            status=status,
            ms=round(1000 * seconds, 2),
            **({"code": code} if code else {}),
        )

    def _op(self, scope: Scope) -> str:
        name = getattr(scope.get("endpoint"), "__name__", "")
        return name if name in self.ops else "other"


class BodyGuard:
    """Count the bodies' bytes while they arrive, and refuse too many of them, or compressed ones.

    The refusal is raised where the route reads the body, so it has the shape of the route's other errors; a
    client that waits for "100 Continue" is refused before it sends.

    Args:
        app: the layers below.
        max_bytes: bytes of one body.
        max_held_bytes: bytes of all bodies whose requests are not answered yet.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_held_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_held_bytes = max_held_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0
        checked = False

        async def receive_counted() -> Message:
            nonlocal received, checked
            if not checked:
                checked = True
                self._check_headers(Headers(scope=scope))
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                received += size
                self._held += size
                if received > self.max_bytes:
                    raise self._too_large()
                if self._held > self.max_held_bytes:
                    raise Overloaded(
                        f"The bodies of the requests under way are over {self.max_held_bytes} bytes "
                        "(IRONCLIP_MAX_HELD_BYTES).",
                        retry_after=1,
                        limit=self.max_held_bytes,
                    )
            return message

        try:
            await self.app(scope, receive_counted, send)
        finally:
            self._held -= received

    def _check_headers(self, headers: Headers) -> None:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ContentEncodingUnsupported("Send the body plain: Content-Encoding is not read here.")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> InputTooLarge:
        return InputTooLarge(
            f"The request's body is over {self.max_bytes} bytes. Send fewer images in one request, or raise "
            "IRONCLIP_MAX_BODY_BYTES.",
            limit=self.max_bytes,
        )


class HeadAsGet:
    """Answer HEAD wherever GET is answered: the same, without the body (RFC 9110, section 9.3.2).

    Args:
        app: the layers below, which see a GET.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 405:
                headers = MutableHeaders(scope=message)
                allowed = [method.strip() for method in headers.get("allow", "").split(",")]
                if "GET" in allowed and "HEAD" not in allowed:
                    headers["Allow"] = ", ".join([*allowed, "HEAD"])
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"} if head else scope, receive, send_head)

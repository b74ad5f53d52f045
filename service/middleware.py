"""Layers around the routes, in plain ASGI: accounts for each request, guards its body, and answers HEAD."""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ironclip.errors import InputTooLarge, Overloaded
from service import telemetry, tracing
from service.errors import ContentEncodingUnsupported, InternalError
from service.headers import header
from service.problems import error_response
from service.telemetry import Stages
from service.tracing import Context, Exporter, Trace, read_context
from service.versions import holding

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{8,128}$")
ENCODER_HEADER = "X-Ironclip-Encoder"
_ENCODER_HEADER = ENCODER_HEADER.lower().encode()
# Routes asked by machines every few seconds: they are counted, and logged at debug.
QUIET = frozenset({"livez", "readyz", "metrics", "oip_live", "oip_ready", "oip_model_ready", "oip_model_version_ready"})
# Routes whose time is the caller's to choose: never slow.
_LONG = frozenset({"attack_probe", "follow_probe"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Accounting:
    """Give each request an id and a trace, time it, count it, log it, and turn a fault of ours into a 500 problem.

    Args:
        app: the layers below.
        ops: names of the endpoint functions that may become a metric's label; others count as "other".
        draining: whether callers should come to another replica from now on.
        audited: names of the endpoint functions whose every use has a line of its own in the log.
        slow_ms: requests that take longer are logged as warnings, with their stages; 0: none are.
        traces: where traces go; None: nowhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        ops: frozenset[str],
        draining: Callable[[], bool] = lambda: False,
        *,
        audited: frozenset[str] = frozenset(),
        slow_ms: float = 0,
        traces: Exporter | None = None,
    ) -> None:
        self.app = app
        self.draining = draining
        self.ops = ops
        self.audited = audited
        self.slow_ms = slow_ms
        self.traces = traces
        self.log = telemetry.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if given and _REQUEST_ID.match(given) else secrets.token_hex(16)
        trace = Trace(_given_context(scope), self.traces)
        tracing.CURRENT.set(trace)
        stages = Stages(trace)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, stages=stages, error_code=None)
        status = 0

        async def send_accounted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                about = [("x-request-id", request_id), ("x-content-type-options", "nosniff")]
                about.append(("traceparent", trace.context.header()))
                if trace.context.state:
                    about.append(("tracestate", trace.context.state))
                if self.draining():
                    about.append(("connection", "close"))  # or the next request would meet a closed connection
                if stages.seconds:
                    about.append(("server-timing", stages.header()))
                # None of these comes from a route, so nothing is looked for before it is put there.
                given_by_route = message.get("headers", ())
                message["headers"] = [*given_by_route, *((name.encode(), value.encode()) for name, value in about)]
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
            self._end(scope, status, trace)

    def _account(self, scope: Scope, status: int, seconds: float, stages: Stages) -> None:
        op, state = self._op(scope), scope["state"]
        telemetry.observe_request(op, status, seconds)
        stages.observe()
        code = state["error_code"]
        if code:
            telemetry.ERRORS.labels(code).inc()
        caller = state.get("caller")
        slow = 0 < self.slow_ms < 1000 * seconds and op not in _LONG
        write = self.log.warning if slow else self.log.debug if op in QUIET else self.log.info
        who = {"key": caller.key, "tenant": caller.tenant} if caller is not None and caller.key else {}
        write(
            "slow request" if slow else "request",
            request_id=state["request_id"],
            op=op,
            status=status,
            ms=round(1000 * seconds, 2),
            **who,
            **({"code": code} if code else {}),
            **({"stages": {name: round(1000 * part, 2) for name, part in stages.seconds.items()}} if slow else {}),
        )
        if op in self.audited:
            about = state.get("audit", {})
            self.log.info("audit", request_id=state["request_id"], op=op, status=status, **who, **about)

    def _end(self, scope: Scope, status: int, trace: Trace) -> None:
        """Hand the request's trace over; what machines ask every few seconds has none."""
        op, state = self._op(scope), scope["state"]
        if trace.recorder is None or op in QUIET:
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        path = getattr(scope.get("route"), "path", "") if op != "other" else ""
        about: dict[str, str | int] = {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.scheme": scope.get("scheme", "http"),
            "ironclip.op": op,
            "ironclip.request_id": state["request_id"],
        }
        if path:
            about["http.route"] = path
        if state["error_code"]:
            about["error.type"] = state["error_code"]
        name = f"{'HTTP' if method == '_OTHER' else method} {path}".rstrip()
        trace.end(name, about, failed=status >= 500 or status == 0)

    def _op(self, scope: Scope) -> str:
        name = getattr(scope.get("endpoint"), "__name__", "")
        return name if name in self.ops else "other"


def _given_context(scope: Scope) -> Context | None:
    """The trace that the request came with."""
    if header(scope, b"traceparent") is None:
        return None
    asked = Headers(scope=scope)
    return read_context(asked.getlist("traceparent"), asked.getlist("tracestate"))


class Holding:
    """Keep the versions of encoders that a request is given until its answer has gone out, and name them in it.

    Args:
        app: the layers below.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with holding(scope["state"]["request_id"]) as held:

            async def send_named(message: Message) -> None:
                if message["type"] == "http.response.start":
                    held.status = message["status"] if asks else 0
                    if names := [f"{version.name}@{version.digest}" for version in held.versions]:
                        named = (_ENCODER_HEADER, ", ".join(names).encode())
                        message["headers"] = [*message.get("headers", ()), named]
                await send(message)

            asks = scope["method"] == "POST"  # the others look at an encoder
            held.status = 500 if asks else 0  # what an answer that never begins becomes
            await self.app(scope, receive, send_named)


class BodyGuard:
    """Count the bodies' bytes while they arrive, and refuse too many of them, or compressed ones.

    The refusal is raised where the route reads the body, so it has the shape of the route's other errors; a
    client that waits for "100 Continue" is refused before it sends.

    Args:
        app: the layers below.
        max_bytes: bytes of one body.
        max_held_bytes: bytes of all bodies whose requests are not answered yet; those of one API key are a quarter of
            it at most, or one body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_held_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_held_bytes = max_held_bytes
        self._held = 0
        self._share = max(max_bytes, max_held_bytes // 4)
        self._by_key: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = scope["state"].get("caller")
        key = caller.key if caller is not None else ""
        received = 0
        checked = over = False

        def hold(size: int) -> None:
            nonlocal received
            if over:
                return  # what is still on its way to a request that has ended is dropped, and was never given back
            received += size
            self._held += size
            if key:
                self._by_key[key] += size
            if received > self.max_bytes:
                raise self._too_large()
            if self._by_key[key] > self._share:
                raise Overloaded(
                    f"The bodies of this API key's requests under way are over {self._share} bytes (a quarter of "
                    "IRONCLIP_MAX_HELD_BYTES, or IRONCLIP_MAX_BODY_BYTES where that is more).",
                    limit_name="held-bytes-of-key",
                    retry_after=1,
                    limit=self._share,
                )
            if self._held > self.max_held_bytes:
                raise Overloaded(
                    f"The bodies of the requests under way are over {self.max_held_bytes} bytes "
                    "(IRONCLIP_MAX_HELD_BYTES).",
                    limit_name="held-bytes",
                    retry_after=1,
                    limit=self.max_held_bytes,
                )

        async def receive_counted() -> Message:
            nonlocal checked
            if not checked:
                checked = True
                self._check_headers(scope)
            message = await receive()
            if message["type"] == "http.request":
                hold(len(message.get("body", b"")))
            return message

        # What is fetched for a request counts as if it had been sent.
        scope.setdefault("state", {})["hold"] = hold
        try:
            await self.app(scope, receive_counted, send)
        finally:
            over = True
            self._held -= received
            if key:
                self._by_key[key] -= received
                if self._by_key[key] <= 0:
                    del self._by_key[key]

    def _check_headers(self, scope: Scope) -> None:
        encoding = header(scope, b"content-encoding")
        if encoding and encoding.strip().lower() not in ("", "identity"):
            raise ContentEncodingUnsupported("Send the body plain: Content-Encoding is not read here.")
        length = header(scope, b"content-length") or ""
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> InputTooLarge:
        return InputTooLarge(
            f"The request's body, and the images fetched for it, are over {self.max_bytes} bytes. Send fewer images in "
            "one request, or raise IRONCLIP_MAX_BODY_BYTES.",
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

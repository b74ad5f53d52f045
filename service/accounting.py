"""The account of each request: metrics, its line in the log, and its trace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.types import Scope

from service import telemetry

if TYPE_CHECKING:
    from service.exchange import Exchange

# Routes asked by machines every few seconds: they are counted, and logged at debug.
_QUIET = frozenset(
    {"livez", "readyz", "metrics", "oip_live", "oip_ready", "oip_model_ready", "oip_model_version_ready"}
)
# Routes whose time is the caller's to choose: never slow.
_LONG = frozenset({"attack_probe", "follow_probe"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Accounts:
    """Counts requests, writes them down, and hands over their traces.

    Args:
        ops: names of the endpoint functions that may become a metric's label; others count as "other".
        audited: names of the endpoint functions whose every use has a line of its own in the log.
        slow_ms: requests that take longer are logged as warnings, with their stages; 0: none are.
    """

    def __init__(self, ops: frozenset[str], audited: frozenset[str] = frozenset(), slow_ms: float = 0) -> None:
        self.ops = ops
        self.audited = audited
        self.slow_ms = slow_ms
        self.log = telemetry.get_logger()

    def op(self, scope: Scope) -> str:
        """What a request asked for, as metrics and the log call it."""
        name = getattr(scope.get("endpoint"), "__name__", "")
        return name if name in self.ops else "other"

    def close(self, exchange: Exchange) -> None:
        """Account for a request whose answer has gone out, or has come to nothing."""
        seconds = time.perf_counter() - exchange.start
        op = self.op(exchange.scope)
        telemetry.observe_request(op, exchange.status, seconds)
        exchange.stages.observe()
        if code := exchange.state["error_code"]:
            telemetry.ERRORS.labels(code).inc()
        self._write(exchange, op, code, seconds)
        if exchange.trace.recorder is not None and op not in _QUIET:  # what machines ask every few seconds has none
            self._end(exchange, op, code)

    def _write(self, exchange: Exchange, op: str, code: str | None, seconds: float) -> None:
        request_id, status, state = exchange.request_id, exchange.status, exchange.state
        caller = state.get("caller")
        who = {"key": caller.key, "tenant": caller.tenant} if caller is not None and caller.key else {}
        about = {"request_id": request_id, "op": op, "status": status, "ms": round(1000 * seconds, 2), **who}
        if code:
            about["code"] = code
        if 0 < self.slow_ms < 1000 * seconds and op not in _LONG:
            stages = {name: round(1000 * part, 2) for name, part in exchange.stages.seconds.items()}
            self.log.warning("slow request", **about, stages=stages)
        elif op in _QUIET:
            self.log.debug("request", **about)
        else:
            self.log.info("request", **about)
        if op in self.audited:
            self.log.info("audit", request_id=request_id, op=op, status=status, **who, **state.get("audit", {}))

    def _end(self, exchange: Exchange, op: str, code: str | None) -> None:
        """Hand the request's trace over."""
        scope, status = exchange.scope, exchange.status
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        path = getattr(scope.get("route"), "path", "") if op != "other" else ""
        about: dict[str, str | int] = {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.scheme": scope.get("scheme", "http"),
            "ironclip.op": op,
            "ironclip.request_id": exchange.request_id,
        }
        if path:
            about["http.route"] = path
        if code:
            about["error.type"] = code
        name = f"{'HTTP' if method == '_OTHER' else method} {path}".rstrip()
        exchange.trace.end(name, about, failed=status >= 500 or status == 0)

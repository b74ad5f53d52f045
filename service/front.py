"""The one layer around the routes: who asks, what a body may hold, what is remembered, and the account of it all.

Every request passes it. A step in it is a call, where a layer of its own would be a coroutine and two closures: an
answer from memory costs little more than the steps.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ironclip.errors import IronclipError
from service import telemetry, tracing, versions
from service.access import Access
from service.accounting import Accounts
from service.bodies import Bodies, Body
from service.errors import InternalError
from service.exchange import Exchange
from service.problems import error_response, handle_error, handle_gone
from service.rate_limits import Limiter, Meter
from service.routes.remembering import Remembering
from service.tracing import Exporter


class Front:
    """Take each request in, answer it from memory or let the routes do it, and turn a fault of ours into a 500 problem.

    Args:
        app: the routes.
        access: who may ask for what.
        limiter: the buckets that requests are paid from.
        bodies: what all bodies may hold.
        remembering: whole answers that are given again.
        accounts: where each request is counted and logged.
        draining: whether callers should come to another replica from now on.
        traces: where traces go; None: nowhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        limiter: Limiter,
        bodies: Bodies,
        remembering: Remembering,
        accounts: Accounts,
        draining: Callable[[], bool] = lambda: False,
        traces: Exporter | None = None,
    ) -> None:
        self.app = app
        self.access = access
        self.limiter = limiter
        self.bodies = bodies
        self.remembering = remembering
        self.accounts = accounts
        self.draining = draining
        self.traces = traces
        self.log = telemetry.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.draining, self.traces)
        tracing.CURRENT.set(exchange.trace)
        held = versions.HELD.set(exchange.held)
        telemetry.IN_FLIGHT.inc()
        try:
            answer = await self._answer(exchange)
            await answer(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            self.log.exception("fault", request_id=exchange.request_id, op=self.accounts.op(exchange.scope))
            exchange.state["error_code"] = InternalError.code
            if exchange.status:
                raise  # the answer has begun: only breaking it off tells the caller
            await _answer_fault(exchange)
        finally:
            telemetry.IN_FLIGHT.dec()
            if exchange.body is not None:
                exchange.body.close()
            # It knows the request, whose state this is: the circle would hold all of it until the collector comes.
            exchange.state.pop("deadline", None)
            exchange.held.release()
            self.accounts.close(exchange)
            versions.HELD.reset(held)

    async def _answer(self, exchange: Exchange) -> ASGIApp:
        """What answers: memory, a refusal, or the routes."""
        scope = exchange.scope
        try:
            try:
                paid_for = self.access.admit(scope)
            finally:  # who asks is known where the answer is no, too
                caller = exchange.state["caller"]
                exchange.state["meter"] = exchange.meter = Meter(self.limiter, caller)
                exchange.body = Body(self.bodies, caller.key)
                exchange.state["hold"] = exchange.body.hold
            if paid_for:
                exchange.meter.check()
            return await self.remembering.find(exchange) or self.app
        except IronclipError as error:
            return await handle_error(Request(scope), error)
        except ClientDisconnect as error:
            return await handle_gone(Request(scope), error)


async def _answer_fault(exchange: Exchange) -> None:
    exchange.meter = None  # it may be what is at fault
    fault = InternalError("Something went wrong in the service; its log has it under this request id.")
    answer = error_response(fault, exchange.scope["path"], exchange.request_id)
    await answer(exchange.scope, exchange.receive, exchange.send)

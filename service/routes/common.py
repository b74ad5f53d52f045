"""What the routes share: the service behind the app, the request's time, answers as JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ironclip.errors import DeadlineExceeded
from service import telemetry
from service.errors import RequestInvalid
from service.telemetry import Stages

if TYPE_CHECKING:
    from service.core import Service

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout-ms"


def service_of(request: Request) -> Service:
    """Return the service behind the app."""
    service: Service = request.app.state.service
    return service


def stages_of(request: Request) -> Stages:
    """Return the request's stopwatch."""
    stages: Stages = request.state.stages
    return stages


def json_response(
    content: Any, stages: Stages | None = None, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return an answer as JSON, its writing timed."""
    start = time.perf_counter()
    body = to_json(content)
    if stages is not None:
        stages.add("serialise", time.perf_counter() - start)
    return Response(body, status, headers, "application/json")


def allowed_seconds(request: Request) -> float:
    """Return how long the request may take: the caller's `X-Request-Timeout-Ms`, within the service's own limit.

    Raises:
        RequestInvalid: the header is not a whole number above 0.
    """
    limit = service_of(request).settings.request_timeout_ms
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is None:
        return limit / 1000
    if not (asked.isascii() and asked.isdigit() and len(asked) < 12 and int(asked) > 0):
        raise RequestInvalid("X-Request-Timeout-Ms is a whole number of milliseconds above 0.")
    return min(limit, int(asked)) / 1000


async def within(request: Request, work: Awaitable[T], seconds: float) -> T:
    """Wait for the work, as long as there is time and somebody who waits for it; else cancel it.

    Call it after the body has been read. Work that has not begun is then never begun.

    Raises:
        DeadlineExceeded: the time is up.
        ClientDisconnect: the caller has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ClientDisconnect()
        telemetry.DROPPED.labels("deadline").inc()
        raise DeadlineExceeded(
            f"The answer was not ready within {round(1000 * seconds)} ms; what had not begun was dropped. Allow "
            "more with X-Request-Timeout-Ms (the service's own limit is IRONCLIP_REQUEST_TIMEOUT_MS).",
            limit=round(1000 * seconds),
        )
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

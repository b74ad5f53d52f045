"""Routes that answer a repeated request from memory, before it is taken apart: see `service.remembered`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.answers import Item
from service.decisions import Plan
from service.forms import Picture, is_json, is_raw, media_type, off_loop
from service.images import bytes_digest
from service.remembered import Terms, request_key
from service.routes.common import Deadline, meter_of, service_of, stages_of
from service.runtime import ServedEncoder


class RememberingRoute(APIRoute):
    """A route whose endpoint calls `remember` when every picture of an answer came from the caches."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """The route's handler, asked only for what is not remembered."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            kind = media_type(request)
            memory = service_of(request).memory
            if not memory.enabled or not (is_raw(kind) or is_json(kind)):
                return await handler(request)
            with Deadline.of(request).receiving():
                body = await request.body()
            meter, state = meter_of(request), request.state
            with stages_of(request).time("cache"):
                state.body_digest = await off_loop(len(body), bytes_digest, body)
                key = request_key(
                    meter.caller.tenant, request.scope["path"], request.scope["query_string"], kind, state.body_digest
                )
                found = await memory.find(key, meter.caller.tenant)
            if found is None:
                state.remember_as = key
                return await handler(request)
            async with meter.paid(found.terms.points):
                return Response(found.body, 200, found.headers, "application/json")

        return answer


def remember(
    request: Request,
    response: Response,
    encoder: str,
    served: ServedEncoder,
    pictures: Sequence[Picture],
    items: Sequence[Item],
    plan: Plan | None = None,
    label_set: str | None = None,
) -> None:
    """Keep an answer, if the next one to the same request would be made of the same parts.

    Args:
        request: that was answered.
        response: the answer.
        encoder: as the request named it.
        served: what it was given.
        pictures: as the request had them.
        items: what became of them.
        plan: where the answer depends on labels.
        label_set: as the request named it.
    """
    key: bytes | None = getattr(request.state, "remember_as", None)
    # What a URL leads to may change.
    if key is None or not items or any(picture.url for picture in pictures):
        return
    if label_set is not None and plan is None:  # which version of the set it was, nobody here knows
        return
    if not all(item.error is None and item.from_cache for item in items):
        return
    digest = plan.reference["digest"] if plan is not None and label_set is not None else ""
    terms = Terms(encoder, served.serial, label_set, digest, meter_of(request).spent)
    headers = {"Cache-Status": response.headers["Cache-Status"]}
    service_of(request).memory.keep(key, terms, bytes(response.body), headers)

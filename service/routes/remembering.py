"""A layer that answers a repeated request from memory, before the framework sees it: see `service.remembered`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ironclip.errors import IronclipError
from service.answers import Item
from service.decisions import Plan
from service.forms import Picture, is_json, is_raw, media_type, off_loop
from service.images import bytes_digest
from service.negotiation import media_type_for
from service.problems import handle_error, handle_gone
from service.rate_limits import Meter
from service.remembered import Memory, Remembered, Terms, request_key
from service.routes.common import Deadline, meter_of, service_of, stages_of
from service.runtime import ServedEncoder


class Remembering:
    """Answer what is remembered; the rest goes on with its body read.

    Args:
        app: the layers below.
        routes: by path, those whose endpoints call `remember`.
        memory: of the answers.
        forms: by path, the media types of routes whose answer has several.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, Route],
        memory: Memory,
        forms: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self.app = app
        self.routes = routes
        self.forms = forms
        self.memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None or not self.memory.enabled:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        kind = media_type(request)
        if not (is_raw(kind) or is_json(kind)):
            await self.app(scope, receive, send)
            return
        scope.update(route=route, endpoint=route.endpoint)  # as the router would
        body, answer = b"", None  # type: tuple[bytes, ASGIApp | None]
        try:
            body, answer = await self._answered(request, receive, kind)
        except IronclipError as error:
            answer = await handle_error(request, error)
        except ClientDisconnect as error:
            answer = await handle_gone(request, error)
        if answer is not None:
            await answer(scope, receive, send)
        else:
            await self.app(scope, _again(body, receive), send)

    async def _answered(self, request: Request, receive: Receive, kind: str) -> tuple[bytes, Remembered | None]:
        """The body, and the answer, paid for, if one holds; if not, `remember` will know the request by its key.

        Raises:
            ClientDisconnect: the body breaks off.
            IronclipError: the answer has no form that is acceptable, the body does not arrive in time or is too large,
                or there are no points left.
        """
        forms = self.forms.get(request.scope["path"])
        form = media_type_for(request, forms) if forms else ""
        async with Deadline.of(request).receiving():
            body = await _body(receive)
        scope, state = request.scope, request.scope["state"]
        meter: Meter = state["meter"]
        with stages_of(request).time("cache"):
            state["body_digest"] = digest = await off_loop(len(body), bytes_digest, body)
            tenant = meter.caller.tenant
            asked = (scope["path"], kind, form, digest)
            state["remember_as"] = key = request_key(tenant, asked, scope["query_string"])
            found = await self.memory.find(key, tenant)
        if found is not None:
            await meter.pay(found.terms.points)
        return body, found


async def _body(receive: Receive) -> bytes:
    """The whole body; not by the framework's generator, which costs as much as hashing a small picture."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body, told once more to whoever reads it."""
    told = False

    async def receive_again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


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
    service_of(request).memory.keep(key, terms, bytes(response.body), response.raw_headers)

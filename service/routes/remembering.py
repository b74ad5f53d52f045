"""A repeated request is answered from memory, before the framework sees it: see `service.remembered`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.answers import Item
from service.decisions import Plan
from service.exchange import Exchange
from service.forms import Picture, is_json, is_raw, media_type, off_loop
from service.images import bytes_digest
from service.negotiation import media_type_for
from service.rate_limits import Meter
from service.remembered import Memory, Remembered, Terms, request_key
from service.routes.common import Deadline, meter_of, service_of
from service.runtime import ServedEncoder


class Remembering:
    """Answer what is remembered; the rest goes on with its body read.

    Args:
        routes: by path, those whose endpoints call `remember`.
        memory: of the answers.
        forms: by path, the media types of routes whose answer has several.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        memory: Memory,
        forms: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self.routes = routes
        self.forms = forms
        self.memory = memory

    async def find(self, exchange: Exchange) -> Remembered | None:
        """The answer, paid for, if one holds; if not, `remember` will know the request by its key.

        Raises:
            ClientDisconnect: the body breaks off.
            IronclipError: the answer has no form that is acceptable, the body does not arrive in time or is too large,
                or there are no points left.
        """
        scope = exchange.scope
        route = self.routes.get(scope["path"]) if scope["method"] == "POST" else None
        if route is None or not self.memory.enabled:
            return None
        request = Request(scope, exchange.receive)
        kind = media_type(request)
        if not (is_raw(kind) or is_json(kind)):
            return None
        scope.update(route=route, endpoint=route.endpoint)  # as the router would
        forms = self.forms.get(scope["path"])
        form = media_type_for(request, forms) if forms else ""
        body = await Deadline.of(request).received(exchange.receive)
        meter: Meter = exchange.state["meter"]
        with exchange.stages.time("cache"):
            exchange.state["body_digest"] = digest = await off_loop(len(body), bytes_digest, body)
            tenant = meter.caller.tenant
            asked = (scope["path"], kind, form, digest)
            exchange.state["remember_as"] = key = request_key(tenant, asked, scope["query_string"])
            found = await self.memory.find(key, tenant)
        if found is not None:
            await meter.pay(found.terms.points)
        else:
            exchange.read_again(body)
        return found


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

"""`/label-sets`: register labels once, name them in every request."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestInvalid
from service.forms import read_json
from service.label_sets import Registered
from service.label_stores import Expect
from service.rate_limits import PICTURE, reading
from service.routes.common import (
    Deadline,
    caller_of,
    etag_matches,
    etags_in,
    json_response,
    meter_of,
    service_of,
)
from service.schemas import LabelSetDocument
from service.settings import NAME_PATTERN

router = APIRouter(tags=["label sets"])

Limit = Annotated[int | None, Query(ge=1, le=1000, description="Sets in one answer; all of them if not given.")]
Cursor = Annotated[str | None, Query(pattern=NAME_PATTERN, description="Where to go on, as `next` has it.")]


@router.get("/label-sets", operation_id="listLabelSets", summary="List the label sets")
async def list_label_sets(request: Request, limit: Limit = None, cursor: Cursor = None) -> Response:
    """Every label set that the caller's tenant has registered, and those that ship with the service, by name.

    With `limit` that many, and `next` is the path of those behind them, as long as there are any. What is registered or
    deleted meanwhile moves nobody from one page to another.
    """
    sets = await service_of(request).label_sets.names(tenant=caller_of(request).tenant)
    if cursor is not None:
        sets = [one for one in sets if one[0] > cursor]
    shown = sets if limit is None else sets[:limit]
    more = len(shown) < len(sets)
    rows = [{"name": name, "digest": digest, "read_only": fixed} for name, digest, fixed in shown]
    behind = {"next": f"/label-sets?limit={limit}&cursor={shown[-1][0]}"} if more else {}
    return json_response({"label_sets": rows, **behind})


@router.get("/label-sets/{name}", operation_id="getLabelSet", summary="Read a label set")
async def get_label_set(request: Request, name: str) -> Response:
    """The newest version of `name`, or the version `name@digest`, in canonical form; its ETag is its digest."""
    entry = await service_of(request).label_sets.get(name, fresh=True, tenant=caller_of(request).tenant)
    if etag_matches(request, entry.digest):
        return Response(status_code=304, headers=_headers(entry))

    def write() -> Response:
        return json_response({**_summary(entry), **entry.document()}, headers=_headers(entry))

    return await asyncio.to_thread(write)  # a set may be megabytes of JSON


@router.put("/label-sets/{name}", operation_id="putLabelSet", summary="Register a label set")
async def put_label_set(request: Request, name: str) -> Response:
    """Make this the newest version of `name`.

    201 if the name is new, else 200. `If-None-Match: *` keeps from replacing a set, `If-Match: "digest"` from
    replacing one that somebody else has changed.
    """
    async with Deadline(request).receiving():
        document = await read_json(request, LabelSetDocument)
    content = {key: value for key, value in document if value is not None}
    service, meter = service_of(request), meter_of(request)
    await meter.pay(reading(len(await request.body())))  # also for labels that then turn out to be none
    async with meter.paid(PICTURE):
        entry, created = await service.label_sets.put(name, content, _expect(request), tenant=meter.caller.tenant)
    request.state.audit = {**_named(name), "labels": entry.digest}
    service.warm(entry, meter)
    return json_response(_summary(entry), status=201 if created else 200, headers=_headers(entry))


@router.delete("/label-sets/{name}", operation_id="deleteLabelSet", summary="Delete a label set")
async def delete_label_set(request: Request, name: str) -> Response:
    """Remove `name` with all its versions; takes the same preconditions as PUT."""
    request.state.audit = _named(name)
    await service_of(request).label_sets.delete(name, _expect(request), tenant=caller_of(request).tenant)
    return Response(status_code=204)


def _named(name: str) -> dict[str, str]:
    """A set's name as the audit has it: its SHA-256, for a name is what a caller typed."""
    return {"name": hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()}


def _summary(entry: Registered) -> dict[str, object]:
    return {"name": entry.name, "digest": entry.digest, "read_only": entry.read_only}


def _headers(entry: Registered) -> dict[str, str]:
    return {"ETag": f'"{entry.digest}"', "Cache-Control": "no-cache"}


def _expect(request: Request) -> Expect:
    return Expect(_etags(request, "if-match"), _etags(request, "if-none-match"))


def _etags(request: Request, header: str) -> tuple[str, ...]:
    tags = tuple(etags_in(request, header))
    if header in request.headers and not tags:
        raise RequestInvalid('A precondition is "*" or a list of quoted ETags.')
    return tags

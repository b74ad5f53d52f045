"""`/attack-probe` and `/probes`: how easily is the decision that is served fooled?"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ironclip.errors import NotReady
from ironclip.probe import estimate, lanes_for
from service import waits
from service.errors import ProbeNotFound, RequestInvalid
from service.forms import Ask, read_ask
from service.idempotency import HEADER, REPLAYED, Claim, read_key, still_coming
from service.probe_asked import affordable, attacked, decision_of, probe_options, within_limit
from service.probe_job import ENDS, Event, Job, new_id
from service.probe_list import CURSOR_PATTERN, Cursor
from service.probe_schemas import ProbeFields, ProbeRequest
from service.probing import Prober
from service.rate_limits import PASS, TEXT, Bill, reading
from service.routes.classify import check_size
from service.routes.common import Deadline, caller_of, fetched, json_response, meter_of, service_of, stages_of

router = APIRouter(tags=["probes"])

# Kept back of the request's time, for the answer of a probe that ends because it is up.
_LAST_SECONDS = 0.5
_HEARTBEAT = 15.0
# What one decision through the defence may cost beside the forwards: a probe makes thousands, each in one piece.
_MAX_COMPARISONS = 100_000_000

Limit = Annotated[int, Query(ge=1, le=1000, description="Probes in one answer.")]
After = Annotated[str | None, Query(pattern=CURSOR_PATTERN, description="Where to go on, as `next` has it.")]


@router.post("/attack-probe", operation_id="attackProbe", summary="Attack a decision")
async def attack_probe(request: Request) -> Response:
    """At which perturbation does this decision break? The very decision that is served is attacked, defence included.

    Give the picture and the labels as for a classification; everything else has a default. The answer has a point for
    each radius that was tried and the bracket `[robust_to, broken_at]`. It is empirical: not a certificate. With
    `Prefer: respond-async` the answer is 202 and the probe is found at `/probes/{id}`; with an `Idempotency-Key` too
    the request may be sent again within a day, and begins no second one: it is told of the first, also where that is
    `forgotten` and `/probes/{id}` is 404.
    """
    service, stages = service_of(request), stages_of(request)
    deadline = Deadline(request)
    async with deadline.receiving():
        ask = await read_ask(request, ProbeRequest, ProbeFields, service.image_limits, 1)
    later = "respond-async" in request.headers.get("prefer", "").lower()
    claim = await _claim(request, ask, deadline) if later and not ask.options.dry_run else None
    if claim is not None and claim.repeated:
        return await _repeated(request, claim)
    bill = Bill(meter_of(request))
    try:
        prober, job, cost = await deadline.within(_prepare(request, ask, bill, claim.identity if claim else ""))
        if job is None:
            return json_response({"dry_run": cost}, stages)
        if not later:
            job.deadline = time.monotonic() + max(0.01, deadline.seconds_left - _LAST_SECONDS)
        asked_at = time.monotonic()
        prober.submit(job)
    except Exception:
        await bill.settle(0)  # it never began
        if claim is not None:
            await service.claims.release(caller_of(request).tenant, claim)
        raise
    settled = service.settle(job, bill)
    if later:
        tenant = caller_of(request).tenant
        await service.probes.add(job, tenant, service.claims.keep(tenant, claim) if claim else None)
        return _accepted(job.id, job.status)
    try:
        with stages.time("model"):
            try:
                await deadline.within(job.wait())
            finally:
                waits.note((job.started or time.monotonic()) - asked_at)
    finally:
        job.cancelled = True  # nobody waits for it any more; one that has ended stays as it is
    await settled  # so that the answer's headers say what is left
    if job.error is not None:
        raise job.error
    return json_response(job.events[-1].data, stages)


async def _claim(request: Request, ask: Ask[ProbeFields], deadline: Deadline) -> Claim | None:
    """What the request's key stands for, if it has one: this request, or the one that it repeats.

    Raises:
        RequestInvalid, IdempotencyKeyReused: it cannot stand for this one.
    """
    key = read_key(request.headers.get(HEADER))
    if key is None:
        return None
    digest = await asyncio.to_thread(_digest_of, ask)
    tenant = caller_of(request).tenant
    return await service_of(request).claims.claim(tenant, key, digest, new_id(), deadline.seconds_left)


def _digest_of(ask: Ask[ProbeFields]) -> str:
    """Of what is asked for, however it was sent: the boundaries of a form are others each time."""
    options = ask.options.model_dump(mode="json", include=set(ProbeFields.model_fields))
    pictures = [[one.digest, one.url, one.pixels_digest.hex()] for one in ask.pictures]
    return hashlib.sha256(json.dumps([options, pictures], sort_keys=True).encode()).hexdigest()


async def _prepare(
    request: Request, ask: Ask[ProbeFields], bill: Bill, identity: str
) -> tuple[Prober, Job | None, dict[str, Any]]:
    """Everything up to the probe's first step, paid for; None in place of the job where only its cost is asked."""
    service, stages, meter = service_of(request), stages_of(request), meter_of(request)
    fields = ask.options
    asked = probe_options(fields, service.settings)
    if len(ask.pictures) != 1:
        raise RequestInvalid("Give one image: a probe is about one decision.")
    if ask.pictures[0].error is not None:
        raise ask.pictures[0].error
    read = reading(ask.size)
    await meter.pay(read)
    plan = await service.plan(
        decision_of(fields, service.encoder(fields.encoder)), ask.size, tenant=meter.caller.tenant
    )
    check_size(plan, 1, 1, _MAX_COMPARISONS)
    prober = plan.served.prober
    if prober is None:
        raise NotReady("This encoder is not probed.")
    classifiers = service.answers.classifiers
    texts = await classifiers.texts_to_encode(plan) if meter.limited else 0
    options = within_limit(asked, fields, plan.defence, service.settings)
    options = affordable(options, fields, plan.defence, meter, read + TEXT * texts)
    aim = {"targeted": fields.target is not None, "vector": fields.objective == "embedding"}
    lanes = lanes_for(plan.served.attacked.device)
    cost = estimate(options, plan.defence, **aim, lanes=lanes)
    most = cost["tower_passes_at_most"]
    if fields.dry_run:
        return prober, None, cost | ({"points_at_most": round(PASS * most, 3)} if meter.limited else {})
    await bill.pay(most, PASS)
    prober.check_place(meter.caller.tenant)  # before anything is fetched for it
    (picture,) = await fetched(request, ask.pictures)
    if picture.error is not None:
        raise picture.error
    item = await service.answers.pixels(plan.served, meter.caller.tenant, picture, stages)
    with stages.time("labels"):
        async with meter.paid(TEXT * texts):
            both = await classifiers.attacked(plan)
        build, about = await asyncio.to_thread(attacked, plan, *both, item, fields, options)
    job = Job(
        build,
        asyncio.get_running_loop(),
        seconds=asked.seconds,
        artefacts=tuple(fields.artefacts),
        about=about,
        resized=item.resized,
        tenant=meter.caller.tenant,
        identity=identity,
    )
    request.state.audit = {
        "probe": job.id,
        "picture": picture.digest,
        "encoder": plan.served.digest,
        "labels": plan.reference["digest"],
        "norm": fields.norm,
        "gradients_at_most": cost["gradients_at_most"],
        "tower_passes_at_most": most,
    }
    return prober, job, {}


async def _repeated(request: Request, claim: Claim) -> Response:
    """The answer to who sends a request again whose first began this probe, or is about to.

    A probe that is known no more is named all the same: what was asked for has been done, and is not begun anew.

    Raises:
        IdempotencyConflict: the first has not begun it yet.
        NotReady: it is another replica's, and Redis is away.
    """
    try:
        events = await service_of(request).probes.events(claim.identity, caller_of(request).tenant)
    except ProbeNotFound:
        if not claim.begun:
            raise still_coming() from None
        status = "forgotten"
    else:
        status = standing(claim.identity, events)["status"]
    return _accepted(claim.identity, status, {REPLAYED: "true"})


def _accepted(identity: str, status: str, headers: dict[str, str] | None = None) -> Response:
    """The answer to who asks for the probe later, once any replica can tell of it."""
    where = f"/probes/{identity}"
    return json_response(
        {"id": identity, "status": status, "events": f"{where}/events"},
        status=202,
        headers={"Location": where, "Preference-Applied": "respond-async", "Retry-After": "1", **(headers or {})},
    )


@router.get("/probes", operation_id="listProbes", summary="List the probes")
async def list_probes(request: Request, limit: Limit = 100, cursor: After = None) -> Response:
    """The caller's tenant's probes that can be asked for by their id, in brief, newest first.

    `next` is the path of those behind them, as long as there are any. What is begun or forgotten meanwhile moves nobody
    from one page to another. With Redis they are those of all replicas, the newest 1000 of a tenant; while Redis is
    away those of this replica alone, and `partial` is true.
    """
    before = Cursor.read(cursor) if cursor is not None else None
    page = await service_of(request).probes.page(caller_of(request).tenant, limit, before)
    behind = {"next": f"/probes?limit={limit}&cursor={page.probes[-1].at}"} if page.more else {}
    return json_response({"probes": [one.row for one in page.probes], **behind, "partial": page.partial})


@router.get("/probes/{id}", operation_id="getProbe", summary="How a probe stands")
async def get_probe(request: Request, id: str) -> Response:
    """Its status, the points known so far, and the answer when it is done."""
    events = await service_of(request).probes.events(id, caller_of(request).tenant)
    form = standing(id, events)
    headers = {} if form["status"] in ENDS else {"Retry-After": "1"}
    return json_response(form, headers=headers)


@router.delete("/probes/{id}", operation_id="cancelProbe", summary="Cancel a probe", status_code=204)
async def cancel_probe(request: Request, id: str) -> Response:
    """It ends with the piece that is under way; one that has ended stays as it is."""
    await service_of(request).probes.cancel(id, caller_of(request).tenant)
    return Response(status_code=204)


@router.get("/probes/{id}/events", operation_id="followProbe", summary="A probe as it goes on")
async def follow_probe(request: Request, id: str) -> Response:
    """Server-sent events `started`, `point`, `progress`, `artefacts`, and in the end `done`, `failed` or `cancelled`.

    Whoever comes late gets the last that was said of each thing; `Last-Event-ID` goes on behind that one, and behind
    the last of all the answer is 204.
    """
    probes, tenant = service_of(request).probes, caller_of(request).tenant
    known = await probes.events(id, tenant)  # an unknown one is a 404, not an empty stream
    last = request.headers.get("last-event-id", "")
    after = int(last) + 1 if last.isascii() and last.isdigit() and len(last) < 9 else 0
    if known and known[-1].kind in ENDS and after > known[-1].number:
        return Response(status_code=204)  # an EventSource that is told so does not come back; it would for ever
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(probes.follow(id, after, tenant)), media_type="text/event-stream", headers=headers)


async def _stream(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Events in the form of the HTML standard, with comments in long pauses, so that proxies keep the line open."""
    waiting: asyncio.Future[Event] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=_HEARTBEAT)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting


def standing(identity: str, events: list[Event]) -> dict[str, Any]:
    """What a probe's events come to."""
    form: dict[str, Any] = {"id": identity, "status": "queued", "points": [], "result": None, "error": None}
    points: dict[float, dict[str, Any]] = {}
    for _, kind, data in events:
        if kind in ENDS:
            form["status"] = kind
            form["result"] = data if kind == "done" else None
            form["error"] = data.get("error") if kind == "failed" else None
        elif kind == "started":
            form |= {"status": "running", **data}
        elif kind == "point":
            points[data["eps"]] = data
        elif kind == "progress":
            form["progress"] = data
    form["points"] = [points[eps] for eps in sorted(points)]
    return form

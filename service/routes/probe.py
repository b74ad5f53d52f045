"""`/attack-probe` and `/probes`: how easily is the decision that is served fooled?"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ironclip.attacks import make_attack
from ironclip.classifier import Classifier
from ironclip.defences import Defence
from ironclip.errors import NotReady, OptionError, shown
from ironclip.probe import Probe, ProbeOptions, Target, VectorTarget, estimate, lanes_for, position
from ironclip.probe.cost import passes, queries_of
from service.answers import Item
from service.decisions import Plan
from service.errors import ProbeNotFound, RequestInvalid
from service.forms import Ask, read_ask
from service.idempotency import HEADER, REPLAYED, Claim, read_key, still_coming
from service.probe_job import ENDS, Event, Job, new_id
from service.probe_schemas import ProbeFields, ProbeRequest
from service.probing import Prober
from service.rate_limits import PASS, PASSES_A_GRADIENT, TEXT, Bill, Meter, reading
from service.routes.classify import check_size
from service.routes.common import Deadline, caller_of, fetched, json_response, meter_of, service_of, stages_of
from service.runtime import ServedEncoder
from service.schemas import Options
from service.settings import Settings

router = APIRouter(tags=["probes"])

# Kept back of the request's time, for the answer of a probe that ends because it is up.
_LAST_SECONDS = 0.5
_HEARTBEAT = 15.0
# A probe of a vector without a label set needs some label for its Classifier; nothing is chosen.
_NO_LABELS = ["picture"]
# What one decision through the defence may cost beside the forwards: a probe makes thousands, each in one piece.
_MAX_COMPARISONS = 100_000_000


@router.post("/attack-probe", operation_id="attackProbe", summary="Attack a decision")
async def attack_probe(request: Request) -> Response:
    """At which perturbation does this decision break? The very decision that is served is attacked, defence included.

    Give the picture and the labels as for a classification; everything else has a default. The answer has a point for
    each radius that was tried and the bracket `[robust_to, broken_at]`. It is empirical: not a certificate. With
    `Prefer: respond-async` the answer is 202 and the probe is found at `/probes/{id}`; with an `Idempotency-Key` too
    the request may be sent again, and begins no second one.
    """
    service, stages = service_of(request), stages_of(request)
    deadline = Deadline(request)
    async with deadline.receiving():
        ask = await read_ask(request, ProbeRequest, ProbeFields, service.image_limits, 1)
    later = "respond-async" in request.headers.get("prefer", "").lower()
    claim = await _claim(request, ask, deadline) if later and not ask.options.dry_run else None
    if claim is not None and claim.repeated:
        return await _repeated(request, claim.identity)
    bill = Bill(meter_of(request))
    try:
        prober, job, cost = await deadline.within(_prepare(request, ask, bill, claim.identity if claim else ""))
        if job is None:
            return json_response({"dry_run": cost}, stages)
        if not later:
            job.deadline = time.monotonic() + max(0.01, deadline.seconds_left - _LAST_SECONDS)
        prober.submit(job)
    except Exception:
        await bill.settle(0)  # it never began
        if claim is not None:
            await service.claims.release(caller_of(request).tenant, claim)
        raise
    settled = service.settle(job, bill)
    if later:
        await service.probes.add(job, caller_of(request).tenant, claim.place if claim else "")
        return _accepted(job.id, job.status)
    try:
        with stages.time("model"):
            await deadline.within(job.wait())
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
    plan = await service.plan(_decision(fields, service.encoder(fields.encoder)), ask.size, tenant=meter.caller.tenant)
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
        build, about = await asyncio.to_thread(_attacked, plan, *both, item, fields, options)
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


async def _repeated(request: Request, identity: str) -> Response:
    """The answer to who sends a request again whose first began this probe.

    Raises:
        IdempotencyConflict: the first has not begun it yet.
        NotReady: it is another replica's, and Redis is away.
    """
    try:
        events = await service_of(request).probes.events(identity, caller_of(request).tenant)
    except ProbeNotFound:
        raise still_coming() from None
    return _accepted(identity, standing(identity, events)["status"], {REPLAYED: "true"})


def _accepted(identity: str, status: str, headers: dict[str, str] | None = None) -> Response:
    """The answer to who asks for the probe later, once any replica can tell of it."""
    where = f"/probes/{identity}"
    return json_response(
        {"id": identity, "status": status, "events": f"{where}/events"},
        status=202,
        headers={"Location": where, "Preference-Applied": "respond-async", "Retry-After": "1", **(headers or {})},
    )


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


def probe_options(fields: ProbeFields, settings: Settings) -> ProbeOptions:
    """The library's options, within the server's limits; raises OptionError."""
    options = ProbeOptions(
        norm=fields.norm,
        eps=tuple(fields.eps or ()),
        max_eps=fields.max_eps or 0.0,
        effort=fields.effort,
        attack="" if fields.attack is None else fields.attack,
        seconds=fields.seconds,
        gradients=fields.gradients or 0,
        draws=fields.draws,
        seed=fields.seed,
    )
    limit = settings.probe_max_seconds
    if options.seconds > limit:
        raise OptionError(
            f"{options.seconds:g} seconds are asked for, at most {limit:g} are allowed here "
            "(IRONCLIP_PROBE_MAX_SECONDS).",
            pointer="/seconds",
            limit=limit,
        )
    _check_steps(options, settings.probe_max_gradients)
    return options


def _check_steps(options: ProbeOptions, limit: int) -> None:
    """Raise OptionError for an attack whose options ask for more queries about one radius than a probe may make."""
    if isinstance(options.attack, str):
        return  # what an effort makes of it ends with the budget
    steps = queries_of(make_attack(options.attack_name, options.attack_options)).all
    if steps > limit:
        raise OptionError(
            f"{shown(steps)} steps are asked for at each radius, at most {limit} are allowed here "
            "(IRONCLIP_PROBE_MAX_GRADIENTS).",
            pointer="/attack",
            limit=limit,
        )


def within_limit(options: ProbeOptions, fields: ProbeFields, defence: Defence, settings: Settings) -> ProbeOptions:
    """The same within the server's limit, which is in gradients without a defence.

    Raises:
        OptionError: the caller asks for more; an effort's own budget is made smaller instead.
    """
    limit = settings.probe_max_gradients
    each = passes(defence, 1, 1)
    most = PASSES_A_GRADIENT * limit // each
    if options.budget <= most:
        return options
    if fields.gradients:
        raise OptionError(
            f"{fields.gradients} gradients are asked for, at most {most} are allowed here"
            + (f", since each goes through a defence and takes {each} forwards" if each > PASSES_A_GRADIENT else "")
            + f" (IRONCLIP_PROBE_MAX_GRADIENTS={limit}).",
            pointer="/gradients",
            limit=most,
        )
    return replace(options, gradients=max(1, most))


def affordable(
    options: ProbeOptions, fields: ProbeFields, defence: Defence, meter: Meter, beside: float
) -> ProbeOptions:
    """The same within what the caller's key can ever have at once, less what the request costs ``beside`` the probe.

    A probe is paid for in advance: without this a key could not ask for an effort whose own budget is more. Whoever
    names a budget is told what it costs instead, where it is paid.
    """
    if not meter.limited or fields.gradients:
        return options
    most = math.floor((meter.caller.burst - beside) / PASS / passes(defence, 1, 1))
    return options if options.budget <= most else replace(options, gradients=max(1, most))


def _decision(fields: ProbeFields, served: ServedEncoder) -> Options:
    """The classification that is attacked."""
    given = fields.model_dump(include=set(Options.model_fields) - {"top_k"}, exclude_none=True)
    if fields.objective == "embedding":
        if fields.label is not None or fields.target is not None or fields.level is not None:
            raise RequestInvalid("With objective embedding nothing is chosen: leave label, target and level out.")
        if "labels" not in given and "label_set" not in given:
            given["labels"] = _NO_LABELS
            if fields.defence is None and served.defence.reads_labels:
                given["defence"] = "none"  # as /embed has it
    elif fields.cosine_below is not None or fields.gallery is not None or fields.top_k is not None:
        raise RequestInvalid("cosine_below, gallery and top_k belong to objective embedding.")
    registered = fields.level is not None and fields.label_set is not None
    if fields.levels is None and (fields.tree is not None or registered):
        given["levels"] = "rollup"
    return Options(**given)


def _attacked(
    plan: Plan,
    served: Classifier,
    attacked: Classifier,
    item: Item,
    fields: ProbeFields,
    options: ProbeOptions,
) -> tuple[Callable[[], Probe], dict[str, Any]]:
    """What makes the probe in the worker's thread, and what its answer says beside; all is checked here.

    Raises:
        IronclipError: a label, level, gallery or vector that cannot be.
    """
    encoder = plan.served.attacked
    if fields.objective == "embedding":
        target: Target = VectorTarget(
            attacked,
            served,
            cosine_below=0.5 if fields.cosine_below is None else fields.cosine_below,
            gallery=_gallery(fields, encoder.dim),
            top_k=fields.top_k or 1,
        )
        if plan.defence.reads_labels and fields.label_set is None and fields.labels is None:
            raise OptionError(
                f"The defence {plan.defence.name!r} makes a vector from labels: give labels or a label_set.",
                pointer="/label_set",
            )
    else:
        target = Target(attacked, served, level=fields.level or "")
    label = position(target.names, fields.label, "/label")
    aim = position(target.names, fields.target, "/target")
    pixels = item.pixels
    assert pixels is not None
    about = {
        "encoder": plan.encoder_form,
        "label_set": dict(plan.reference) if target.names else None,
        "level": fields.level,
        "defence": plan.defence_form,
        "preprocessing": {"digest": encoder.preprocessing.digest, "warnings": item.warnings},
    }

    def build() -> Probe:
        return Probe(target, pixels, options, label=label, target_label=aim)

    return build, about


def _gallery(fields: ProbeFields, dim: int) -> torch.Tensor | None:
    """The gallery as unit vectors [G, dim].

    Raises:
        OptionError: vectors of another length, or without one; or no more of them than top_k.
    """
    if fields.gallery is None:
        if fields.top_k is not None:
            raise RequestInvalid("top_k is of a gallery: give one.")
        return None
    rows = fields.gallery
    if len(rows) <= (fields.top_k or 1):
        raise OptionError("The gallery needs more vectors than top_k, or nothing can change.", pointer="/gallery")
    for i, row in enumerate(rows):
        if len(row) != dim:
            raise OptionError(f"A vector of {len(row)} numbers; this encoder's have {dim}.", pointer=f"/gallery/{i}")
    vectors = torch.tensor(rows, dtype=torch.float32)
    lengths = vectors.norm(dim=1, keepdim=True)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise OptionError("A vector of the gallery has no direction.", pointer="/gallery")
    unit: torch.Tensor = vectors / lengths
    return unit

"""`/models`: what is served, what it can do, how it was measured; and its change at run time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ironclip.classifier import LEVEL_MODES
from ironclip.defences import DEFENCES, Defence, make_defence
from ironclip.errors import NotReady, OptionError
from ironclip.labels import TEMPLATES
from service.decisions import encoder_reference
from service.forms import read_json
from service.routes.common import Deadline, json_response, service_of
from service.runtime import ServedEncoder
from service.schemas import ModelDocument
from service.settings import DEFAULT_ALIAS, NAME_PATTERN

if TYPE_CHECKING:
    from service.core import Service

router = APIRouter(tags=["models"])


@router.get("/models", operation_id="listModels", summary="List the encoders")
async def list_models(request: Request) -> Response:
    """Every served encoder with what it can do, and what every request may ask for."""
    service = service_of(request)
    settings = service.settings
    return json_response(
        {
            "default": settings.default_name,
            "models": [{**describe(one), **_standing(service, one.name)} for one in service.models.served],
            "pending": [_standing(service, name) for name in service.models.pending()],
            "defences": list(DEFENCES),
            "defence_details": [describe_defence(make_defence(name)) for name in DEFENCES],
            "level_modes": list(LEVEL_MODES),
            "templates": {name: list(templates) for name, templates in TEMPLATES.items()},
            "limits": {
                "max_body_bytes": settings.max_body_bytes,
                "max_image_bytes": settings.max_image_bytes,
                "max_pixels": settings.max_pixels,
                "max_side": settings.max_side,
                "max_images": settings.max_images,
                "max_texts": settings.max_texts,
                "max_labels": settings.max_labels,
                "max_registered_labels": settings.max_registered_labels,
                "max_prompts": settings.max_prompts,
                "max_text_chars": settings.max_text_chars,
                "max_views": settings.max_views,
                "request_timeout_ms": settings.request_timeout_ms,
            },
        }
    )


@router.get("/models/{name}", operation_id="getModel", summary="Describe an encoder")
async def get_model(request: Request, name: str) -> Response:
    """One encoder: capabilities, sizes, how its compute type was chosen, provenance, measured scores, its versions.

    Of one that is being loaded for the first time, or could not be, the versions alone.
    """
    service = service_of(request)
    if name in service.models.pending():
        return json_response(_standing(service, name))
    described = describe(service.models.stable(name))
    return json_response({**described, **_standing(service, described["name"])})


@router.put("/models/{name}", operation_id="putModel", summary="Load an encoder, or swap it")
async def put_model(request: Request, name: str) -> Response:
    """Load a version beside what is served, verify and warm it, then point the name to it; the old one drains.

    Answers 202 at once, and `GET /models/{name}` tells how it goes; a version that cannot be loaded leaves the old one
    where it is. 200 if this digest is served already. With `canary` the version gets that share of the name's
    requests, until it is promoted or deleted. It holds for this process, until it ends.
    """
    async with Deadline(request).receiving():
        asked = await read_json(request, ModelDocument)
    service = service_of(request)
    _check_name(name)
    _check_state(service)
    path = await asyncio.to_thread(service.specs.checked, asked.spec)
    defence = service.read_defence(asked.defence) if asked.defence is not None else None
    started = service.models.put(
        name, asked.spec, path, expected=asked.digest or "", defence=defence, share=asked.canary or 0.0
    )
    request.state.audit = {"encoder": name, "digest": asked.digest or "", "canary": asked.canary or 0.0}
    headers = {"Location": f"/models/{name}", "Retry-After": "1"} if started else {}
    return json_response(_standing(service, name), status=202 if started else 200, headers=headers)


@router.post("/models/{name}/promote", operation_id="promoteModel", summary="Give the canary all requests")
async def promote_model(request: Request, name: str) -> Response:
    """The canary becomes the version that the name stands for; the one before drains."""
    return _changed(request, name, service_of(request).models.promote)


@router.delete("/models/{name}/canary", operation_id="deleteCanary", summary="Take the canary out")
async def delete_canary(request: Request, name: str) -> Response:
    """The stable version takes all requests again; the canary drains."""
    return _changed(request, name, service_of(request).models.end_canary)


@router.delete("/models/{name}", operation_id="deleteModel", summary="Unload an encoder", status_code=202)
async def delete_model(request: Request, name: str) -> Response:
    """Take no more requests for it; what has it in hand ends well. Not the default encoder, and not the last one."""
    service = service_of(request)
    service.models.unload(name)
    request.state.audit = {"encoder": name}
    return json_response(_standing(service, name), status=202)


def _changed(request: Request, name: str, change: Callable[[str], None]) -> Response:
    service = service_of(request)
    change(name)
    request.state.audit = {"encoder": name}
    return json_response(_standing(service, name))


def _standing(service: Service, name: str) -> dict[str, Any]:
    return {"name": service.models.resolved(name), "versions": service.models.standing(name)}


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name) or name == DEFAULT_ALIAS:
        raise OptionError(f"An encoder's name is {NAME_PATTERN}, and not {DEFAULT_ALIAS!r}.")


def _check_state(service: Service) -> None:
    if service.state != "ready":
        raise NotReady(f"The service is {service.state}: it takes no encoder.", retry_after=1)


def describe_defence(defence: Defence) -> dict[str, Any]:
    """What a defence says of itself, and its options with their defaults."""
    return {
        "name": defence.name,
        "random": defence.random,
        "differentiable": defence.differentiable,
        "optimising": defence.optimising,
        "reads_labels": defence.reads_labels,
        "heads": list(defence.heads),
        "cost": defence.cost,
        "options": defence.options(),
    }


def describe(served: ServedEncoder) -> dict[str, Any]:
    """All there is to say of one encoder."""
    encoder = served.encoder
    provenance = {key: value for key, value in encoder.provenance.items() if key not in ("scores", "golden")}
    return {
        **encoder_reference(served),
        "spec": encoder.spec,
        "capabilities": ["classify", "embed-image", "embed-text"],
        "dim": encoder.dim,
        "resolution": encoder.resolution,
        "context_length": encoder.context_length,
        "logit_scale": round(float(encoder.logit_scale), 4),
        "default_templates": list(encoder.default_templates),
        "defence": {"name": served.defence.name, **served.defence.options()},
        "probe": served.probe_report,
        "device": str(encoder.device),
        "dtype_report": served.dtype_report.to_json(),
        "forward_report": served.forward_report.to_json(),
        "preprocessing": {"digest": encoder.preprocessing.digest, **asdict(encoder.preprocessing)},
        "provenance": provenance,
        "scores": encoder.provenance.get("scores", {}),
    }

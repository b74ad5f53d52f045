"""`/models`: what is served, what it can do, and how it was measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ironclip.classifier import LEVEL_MODES
from ironclip.defences import DEFENCES, Defence, make_defence
from ironclip.labels import TEMPLATES
from service.decisions import encoder_reference
from service.routes.common import json_response, service_of
from service.runtime import ServedEncoder

router = APIRouter(tags=["models"])


@router.get("/models", operation_id="listModels", summary="List the encoders")
async def list_models(request: Request) -> Response:
    """Every served encoder with what it can do, and what every request may ask for."""
    service = service_of(request)
    settings = service.settings
    return json_response(
        {
            "default": settings.default_name,
            "models": [describe(one) for one in service.served.values()],
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
    """One encoder: capabilities, sizes, how its compute type was chosen, provenance and measured scores."""
    return json_response(describe(service_of(request).encoder(name)))


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
    provenance = {key: value for key, value in encoder.provenance.items() if key != "scores"}
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
        "preprocessing": {"digest": encoder.preprocessing.digest, **asdict(encoder.preprocessing)},
        "provenance": provenance,
        "scores": encoder.provenance.get("scores", {}),
    }

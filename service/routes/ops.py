"""What operators and machines ask: health, metrics, the documents, the meaning of an error."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from ironclip.errors import NotFound
from service.errors import problem_types
from service.routes.common import json_response, service_of

router = APIRouter(tags=["operations"])
# Apart: with a port of its own it is not on the service's.
metrics_router = APIRouter(tags=["operations"])

# Swagger UI's files come from this package; the page must work where there is no way out.
_ASSETS = Path(fastapi_offline.__file__).parent / "static"
_ASSET_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}


@router.get("/livez", operation_id="livez", summary="Is the process alive?")
async def livez(request: Request) -> Response:
    """200 as long as the process answers; 503 once a model worker or the decoder is lost, and the process should go."""
    lost = service_of(request).lost
    return json_response({"status": "lost", "reason": lost}, status=503) if lost else json_response({"status": "ok"})


@router.get("/readyz", operation_id="readyz", summary="Can it answer?")
async def readyz(request: Request) -> Response:
    """200 when requests can be answered; 503 while loading, draining, or when a model worker or the decoder is dead."""
    reason = service_of(request).not_ready()
    if reason is None:
        return json_response({"status": "ready"})
    return json_response({"status": "unavailable", "reason": reason}, status=503, headers={"Retry-After": "1"})


@metrics_router.get("/metrics", operation_id="metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/problems/{code}", operation_id="getProblem", summary="The meaning of an error")
async def get_problem(request: Request, code: str) -> Response:
    """What a problem's `type` points to: title, status and meaning of an error code."""
    known = problem_types()
    if code not in known:
        raise NotFound(f"There is no such error code; there are: {', '.join(sorted(known))}.")
    return json_response(known[code])


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The interactive documentation, from local files alone."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Ironclip",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # it would send the document to a site of Swagger's
    )


@router.get("/docs/assets/{name}", include_in_schema=False)
async def docs_asset(request: Request, name: str) -> Response:
    """One file of the documentation page."""
    if name not in _ASSET_TYPES:
        raise NotFound("There is no such file.")
    return FileResponse(_ASSETS / name, media_type=_ASSET_TYPES[name])

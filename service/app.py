"""The ASGI app: routes, the front around them, and the service's life from loading to draining."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from ironclip import __version__
from ironclip.errors import IronclipError
from service import openapi
from service.access import ACCESS, Access, operation
from service.accounting import Accounts
from service.bodies import Bodies
from service.core import Service
from service.exchange import ENCODER_HEADER
from service.front import Front
from service.problems import handle_error, handle_gone
from service.routes import classify, embed, label_sets, models, oip, oip_infer, ops, playground, probe
from service.routes import openai as openai_routes
from service.routes.remembering import Remembering
from service.settings import Settings, load_settings
from service.tracing import Exporter

ROUTERS = (
    classify.router,
    embed.router,
    label_sets.router,
    models.router,
    oip.router,
    oip_infer.router,
    openai_routes.router,
    ops.router,
    ops.metrics_router,
    playground.router,
    probe.router,
)
# What a page may send and read beyond what every page may.
_CORS_ASKED = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Inference-Header-Content-Length",
    "Last-Event-ID",
    "Prefer",
    "Priority",
    "X-API-Key",
    "X-Request-Id",
    "X-Request-Timeout-Ms",
    "traceparent",
    "tracestate",
)
_CORS_ANSWERED = (
    "Allow",
    "Cache-Status",
    "ETag",
    "Idempotent-Replayed",
    "Inference-Header-Content-Length",
    "Location",
    "Preference-Applied",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "Server-Timing",
    "WWW-Authenticate",
    ENCODER_HEADER,
    "X-Request-Id",
    "traceparent",
    "tracestate",
)
# Uses of these are logged with who and what (as a digest), beside the routes that need the scope `admin`.
_AUDITED = frozenset({"attack_probe", "cancel_probe", "put_label_set", "delete_label_set"})


def create_app(
    settings: Settings | None = None,
    *,
    on_fatal: Callable[[IronclipError], None] | None = None,
    traces: Exporter | None = None,
) -> FastAPI:
    """Return the app over a new Service.

    Args:
        settings: read from the environment if not given.
        on_fatal: called when an encoder cannot be loaded.
        traces: where traces go; None: nowhere.

    Raises:
        SettingsInvalid: the environment cannot be used.
    """
    settings = settings or load_settings()
    service = Service(settings, on_fatal)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Ironclip",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # What is told of a request is told by ourselves, under names that are agreed on.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    left_out = [] if settings.probes else [probe.router]
    if settings.metrics_port:
        left_out.append(ops.metrics_router)
    included = [router for router in ROUTERS if router not in left_out]
    for router in included:
        app.include_router(router)
    for kind in (IronclipError, HTTPException, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(ClientDisconnect, handle_gone)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    _add_front(app, service, included, traces)
    return app


def _add_front(app: FastAPI, service: Service, included: Sequence[APIRouter], traces: Exporter | None) -> None:
    """Put the front around the routes, and around it what browsers on other origins need."""
    settings = service.settings
    ops_names = frozenset(
        getattr(route.endpoint, "__name__", "")
        for router in ROUTERS
        for route in router.routes
        if hasattr(route, "endpoint")
    )
    # Not app.routes alone: what is included there may stand as one entry for a whole router.
    routes = [*app.routes, *(route for router in included for route in router.routes)]
    remembered = (classify.classify, embed.embed)
    known = {route.path: route for route in routes if isinstance(route, Route) and route.endpoint in remembered}
    forms = {path: embed.FORMS for path, route in known.items() if route.endpoint is embed.embed}
    app.add_middleware(
        Front,
        access=Access(routes, service.keys),
        limiter=service.limiter,
        bodies=Bodies(settings.max_body_bytes, settings.max_held_bytes),
        remembering=Remembering(known, service.memory, forms),
        accounts=Accounts(ops_names, _AUDITED | _of_admins(), settings.slow_request_ms),
        draining=lambda: service.state == "draining",
        traces=traces,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=_CORS_ASKED,
            expose_headers=_CORS_ANSWERED,
        )


def _of_admins() -> frozenset[str]:
    """Names of the endpoint functions that only a key with the scope `admin` may ask."""
    return frozenset(
        route.endpoint.__name__
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if ACCESS.get(operation(method, route.path)) == ("admin",)
    )

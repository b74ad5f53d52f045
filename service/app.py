"""The ASGI app: routes, layers around them, and the service's life from loading to draining."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ironclip import __version__
from ironclip.errors import IronclipError
from service import openapi
from service.core import Service
from service.errors import handle_error
from service.middleware import Accounting, BodyGuard, HeadAsGet
from service.routes import classify, embed, label_sets, models, ops, playground, probe
from service.routes import openai as openai_routes
from service.settings import Settings, load_settings

ROUTERS = (
    classify.router,
    embed.router,
    label_sets.router,
    models.router,
    openai_routes.router,
    ops.router,
    playground.router,
    probe.router,
)


def create_app(settings: Settings | None = None, *, on_fatal: Callable[[IronclipError], None] | None = None) -> FastAPI:
    """Return the app over a new Service.

    Args:
        settings: read from the environment if not given.
        on_fatal: called when an encoder cannot be loaded.

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
    )
    app.state.service = service
    for router in ROUTERS:
        if settings.probes or router is not probe.router:
            app.include_router(router)
    for kind in (IronclipError, HTTPException, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    ops_names = frozenset(
        getattr(route.endpoint, "__name__", "")
        for router in ROUTERS
        for route in router.routes
        if hasattr(route, "endpoint")
    )
    app.add_middleware(BodyGuard, max_bytes=settings.max_body_bytes, max_held_bytes=settings.max_held_bytes)
    app.add_middleware(Accounting, ops=ops_names)
    app.add_middleware(HeadAsGet)
    return app


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what the log and the metrics call it."""
    return Response(status_code=499)

"""A gateway in front of a service: everything below a path prefix, nothing at the root; streams pass as they come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

PREFIX = "/below/a/prefix"
# Of one connection, not of the message.
_HOP = {"content-length", "transfer-encoding", "connection", "content-encoding"}


@contextlib.contextmanager
def gateway(upstream: str, port: int) -> Iterator[str]:
    """Pass everything below PREFIX on to a service; yields the URL that stands for it."""
    client = httpx.AsyncClient(base_url=upstream, timeout=60)

    async def forward(request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in {"host", *_HOP}}
        asked = client.build_request(
            request.method,
            "/" + request.path_params["path"],
            params=request.url.query,
            headers=headers,
            content=await request.body(),
        )
        answer = await client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            async for part in answer.aiter_raw():
                yield part

        kept = {name: value for name, value in answer.headers.items() if name not in _HOP - {"content-encoding"}}
        return StreamingResponse(body(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    routes = [Route("/{path:path}", forward, methods=["GET", "POST", "PUT", "DELETE"])]
    app = Starlette(routes=[Mount(PREFIX, routes=routes)])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(5)

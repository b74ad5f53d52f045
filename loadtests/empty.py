"""A route that receives a body, hashes it and answers: what the service's answers from the cache are held against.

Run by the server that the service runs under: `python -m uvicorn loadtests.empty:app`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request

Message = MutableMapping[str, Any]


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """Answer every request with the SHA-256 of its body."""
    if scope["type"] != "http":
        return
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    answer = b'{"digest": "%s"}' % hashlib.sha256(b"".join(parts)).hexdigest().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


framework = FastAPI(openapi_url=None)


@framework.post("/{path:path}")
async def empty(request: Request) -> dict[str, str]:
    """The same as a route of the framework that the service is written in: `loadtests.empty:framework`."""
    return {"digest": hashlib.sha256(await request.body()).hexdigest()}


@framework.get("/")
def ready() -> dict[str, str]:
    """Answered as soon as it listens."""
    return {}

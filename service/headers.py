"""One header of a request, read from the connection's own list: each request is asked for several."""

from __future__ import annotations

from starlette.types import Scope


def every(scope: Scope, name: bytes) -> str:
    """All values of a header in one, with commas between (RFC 9110, section 5.3); "" where there is none."""
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def header(scope: Scope, name: bytes) -> str | None:
    """The first value of a header, or None. ASGI gives names in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None

"""The media type of an answer: what a request's `Accept` asks for, among what there is (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mimeparse
from starlette.requests import Request

from service.errors import NotAcceptable
from service.headers import every

JSON = "application/json"
# No client sends as much; the library's time grows with the square of what is in quotes.
_MOST_CHARS = 1000


def media_type_for(request: Request, offered: Sequence[str]) -> str:
    """The media type to answer in; the usual one where the request does not say, or says nothing that can be read.

    Args:
        request: whose `Accept` is read; what cannot be read in it is passed over.
        offered: media types, the usual one last.

    Raises:
        NotAcceptable: it takes none of them, or is longer than anything that is read.
    """
    return chosen(every(request.scope, b"accept"), tuple(offered))


@lru_cache(maxsize=256)
def chosen(accept: str, offered: tuple[str, ...]) -> str:
    """As `media_type_for`, for the value of the header."""
    if len(accept) > _MOST_CHARS:
        raise NotAcceptable(f"`Accept` has {len(accept)} characters, at most {_MOST_CHARS} are read.")
    ranges = [part for part in accept.lower().split(",") if _readable(part)]
    if not ranges:
        return offered[-1]
    found: str = mimeparse.best_match(offered, ",".join(ranges))
    if not found:
        raise NotAcceptable(f"`Accept` takes none of the forms of this answer: {', '.join(reversed(offered))}.")
    return found


def _readable(part: str) -> bool:
    try:
        mimeparse.parse_media_range(part)
    except mimeparse.MimeTypeParseException:
        return False
    return bool(part.strip())

"""The media type of an answer: what a request's `Accept` asks for, among what there is (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import mimeparse
from starlette.requests import Request

from service.errors import NotAcceptable
from service.headers import every

JSON = "application/json"
# No client sends as much; the library's time grows with the square of what is in quotes.
_MOST_CHARS = 1000


def media_type_for(request: Request, offered: Sequence[str]) -> str:
    """The media type to answer in; JSON where the request does not say, or says what cannot be read.

    Args:
        request: whose `Accept` is read.
        offered: media types, the one that is meant where several please as well last.

    Raises:
        NotAcceptable: it takes none of them.
    """
    asked = every(request.scope, b"accept").lower()
    if not asked or len(asked) > _MOST_CHARS:
        return offered[-1]
    try:
        found: str = mimeparse.best_match(offered, asked)
    except mimeparse.MimeTypeParseException:
        return offered[-1]
    if not found:
        raise NotAcceptable(f"`Accept` takes none of the forms of this answer: {', '.join(reversed(offered))}.")
    return found

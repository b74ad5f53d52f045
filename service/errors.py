"""The one table from error class to HTTP status, and the two shapes an error takes on the wire.

Everything is RFC 9457 `application/problem+json`, the framework's own refusals too; below `/v1` it is OpenAI's
`{"error": {...}}`. A problem never repeats what the caller sent beyond what the error's author put into its text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ironclip import errors as lib
from service import telemetry
from service.settings import SettingsInvalid

PROBLEM_JSON = "application/problem+json"
# What is shown of one key of the caller's, and of how many faults any is shown.
_POINTER_CHARS = 100
_MAX_FAULTS = 10_000


class BodyMalformed(lib.InputError):
    """The body is not what its Content-Type says: not JSON, not UTF-8, or not a multipart form."""

    code = "body-malformed"
    title = "The body cannot be read"


class RequestInvalid(lib.InputError):
    """Fields are missing, unknown, of the wrong type or out of bounds; each is listed."""

    code = "request-invalid"
    title = "The request does not have the documented form"

    def __init__(self, detail: str, *, errors: Sequence[dict[str, str]] = ()) -> None:
        super().__init__(detail)
        self.errors = list(errors)


class MediaTypeUnsupported(lib.InputError):
    """The Content-Type is not one this route reads."""

    code = "media-type-unsupported"
    title = "The media type is not supported"


class ContentEncodingUnsupported(lib.InputError):
    """The body is compressed: bodies are counted as they arrive, so they must arrive plain."""

    code = "content-encoding-unsupported"
    title = "The content encoding is not supported"


class RouteNotFound(lib.NotFound):
    """There is nothing under this path."""

    code = "route-not-found"
    title = "No such path"


class MethodNotAllowed(lib.InputError):
    """The path exists and does not take this method."""

    code = "method-not-allowed"
    title = "The method is not allowed here"


class LabelSetReadOnly(lib.Conflict):
    """A label set that ships with the service cannot be replaced or deleted."""

    code = "label-set-read-only"
    title = "The label set is read-only"


class ProbeNotFound(lib.NotFound):
    """No probe of this id is known: it never was, or it has been forgotten since its end."""

    code = "probe-not-found"
    title = "There is no such probe"


class TooManyLabelSets(lib.Conflict):
    """As many label sets are registered as the service keeps; delete one, or put a new version of one."""

    code = "too-many-label-sets"
    title = "Too many label sets are registered"


class InternalError(lib.IronclipError):
    """A fault of the service, not of the request; the log has it under the request id."""

    code = "internal-error"
    title = "Internal error"


STATUS: dict[type[lib.IronclipError], int] = {
    lib.IronclipError: 500,
    lib.InputError: 422,
    lib.OptionError: 422,
    lib.ImageError: 422,
    lib.ImageInvalid: 422,
    lib.ImageUnsupported: 422,
    lib.ImageTooLarge: 413,
    lib.LabelError: 422,
    lib.TooManyLabels: 422,
    lib.TreeError: 422,
    lib.InputTooLarge: 413,
    lib.NotFound: 404,
    lib.EncoderNotFound: 404,
    lib.LabelSetNotFound: 404,
    lib.Conflict: 412,
    lib.EncoderLoadError: 500,
    lib.UnknownEncoder: 500,
    lib.WeightsUnavailable: 500,
    lib.ChecksumMismatch: 500,
    lib.ArchitectureMismatch: 500,
    lib.ArtifactError: 500,
    lib.Unavailable: 503,
    lib.Overloaded: 429,
    lib.NotReady: 503,
    lib.DeadlineExceeded: 504,
    SettingsInvalid: 500,
    BodyMalformed: 400,
    RequestInvalid: 422,
    MediaTypeUnsupported: 415,
    ContentEncodingUnsupported: 415,
    RouteNotFound: 404,
    ProbeNotFound: 404,
    MethodNotAllowed: 405,
    LabelSetReadOnly: 409,
    TooManyLabelSets: 409,
    InternalError: 500,
}


def status_of(error: lib.IronclipError) -> int:
    """HTTP status of an error: that of its class, or of the nearest class above it."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_classes(root: type[lib.IronclipError] = lib.IronclipError) -> Iterator[type[lib.IronclipError]]:
    """Every class of the error tree, the root first."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


def problem_types() -> dict[str, dict[str, Any]]:
    """What `GET /problems/{code}` answers: code -> title, status and meaning."""
    return {
        kind.code: {
            "code": kind.code,
            "title": kind.title,
            "status": STATUS[kind],
            "description": (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " "),
        }
        for kind in STATUS
    }


def problem(error: lib.IronclipError, request_id: str | None = None) -> dict[str, Any]:
    """Return the error as an RFC 9457 problem."""
    body: dict[str, Any] = {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": status_of(error),
        "detail": error.detail,
        "code": error.code,
    }
    if request_id:
        body["instance"] = f"urn:request:{request_id}"
    if isinstance(error, RequestInvalid) and error.errors:
        body["errors"] = error.errors
    elif error.pointer is not None:
        body["errors"] = [{"pointer": error.pointer, "code": error.code, "detail": error.detail}]
    if error.limit is not None:
        body["limit"] = error.limit
    if isinstance(error, lib.Unavailable) and error.retry_after is not None:
        body["retry_after_ms"] = round(error.retry_after * 1000)
    return body


def openai_error(error: lib.IronclipError) -> dict[str, Any]:
    """Return the error in OpenAI's shape."""
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    pointer = error.pointer
    if isinstance(error, RequestInvalid) and error.errors:
        pointer = error.errors[0]["pointer"]
    param = pointer.strip("/").replace("/", ".") if pointer else None
    return {"error": {"message": error.detail, "type": kind, "param": param or None, "code": error.code}}


def error_response(error: lib.IronclipError, path: str, request_id: str | None) -> Response:
    """Return the response for an error: OpenAI's shape below `/v1`, a problem elsewhere."""
    headers: dict[str, str] = {}
    if isinstance(error, lib.Unavailable) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if path.startswith("/v1/"):
        return Response(to_json(openai_error(error)), status_of(error), headers, "application/json")
    return Response(to_json(problem(error, request_id)), status_of(error), headers, PROBLEM_JSON)


def pointer_of(location: Sequence[str | int]) -> str:
    """JSON Pointer (RFC 6901) of a pydantic error location, long keys cut short: they are the caller's."""
    parts = (part if len(part) <= _POINTER_CHARS else part[:_POINTER_CHARS] + "..." for part in map(str, location))
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def from_validation(error: ValidationError) -> lib.IronclipError:
    """Return pydantic's findings as our error; the input itself is left out."""
    if error.error_count() > _MAX_FAULTS:  # to have them listed would take longer than to find them
        return RequestInvalid(f"{error.error_count()} fields are unknown or not of the documented form.")
    return from_faults(error.errors(include_url=False, include_context=False, include_input=False))


def from_faults(found: Sequence[Any]) -> lib.IronclipError:
    """Return a list of findings, in pydantic's form, as our error."""
    if found and found[0]["type"] == "json_invalid":
        return BodyMalformed(str(found[0]["msg"]) + ".")
    faults = [
        {
            "pointer": pointer_of(item["loc"]),
            "code": str(item["type"]).replace("_", "-"),
            "detail": str(item["msg"]).removeprefix("Value error, "),
        }
        for item in found[:20]
    ]
    first = faults[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return RequestInvalid(f"{first['pointer'] or 'The body'}: {first['detail']}{more}", errors=faults)


def from_http(error: HTTPException) -> lib.IronclipError:
    """Return an exception of the framework as one of ours."""
    if error.status_code == 404:
        return RouteNotFound("There is nothing under this path; /docs lists what is here.")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"This path takes {allowed or 'other methods'}.")
    if error.status_code == 413:
        return lib.InputTooLarge("The request is too large.")
    if error.status_code == 415:
        return MediaTypeUnsupported("This Content-Type is not read here; /docs lists which are.")
    if error.status_code < 500:
        return BodyMalformed("The request cannot be read.")
    return InternalError("Something went wrong in the service.")


def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler for everything that has a place in the table (registered for each family)."""
    known = as_ironclip(error)
    response = error_response(known, request.url.path, getattr(request.state, "request_id", None))
    request.state.error_code = known.code
    if isinstance(known, lib.Overloaded):
        telemetry.DROPPED.labels("overload").inc()
    if isinstance(error, HTTPException) and error.headers and "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def as_ironclip(error: Exception) -> lib.IronclipError:
    """Return the error itself if it is ours, else the one of ours that stands for it."""
    if isinstance(error, lib.IronclipError):
        return error
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, RequestValidationError):
        return from_faults(error.errors())
    if isinstance(error, HTTPException):
        return from_http(error)
    return InternalError("Something went wrong in the service; its log has it under this request id.")

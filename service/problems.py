"""The three shapes an error takes on the wire, and what the framework raises as errors of ours.

Everything is RFC 9457 `application/problem+json`, the framework's own refusals too; below `/v1` it is OpenAI's
`{"error": {...}}`, below `/v2` the Open Inference Protocol's `{"error": "..."}`. A problem never repeats what the
caller sent beyond what the error's author put into its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ironclip import errors as lib
from service import telemetry
from service.errors import (
    AccessDenied,
    BodyMalformed,
    InternalError,
    MediaTypeUnsupported,
    MethodNotAllowed,
    RequestInvalid,
    RouteNotFound,
    status_of,
)

PROBLEM_JSON = "application/problem+json"
_SOON = 1.0  # seconds after which a 503 that says nothing else may be asked again
# What is shown of one key of the caller's, and of how many faults any is shown.
_POINTER_CHARS = 100
_MAX_FAULTS = 10_000


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
    if isinstance(error, lib.Overloaded):
        body["limit_name"] = error.limit_name
    wait = retry_after(error)
    if wait is not None:
        body["retry_after_ms"] = round(wait * 1000)
    return body


def retry_after(error: lib.IronclipError) -> float | None:
    """Seconds after which it is worth asking again; None where nobody knows.

    Where the service cannot answer now somebody else may, or itself soon: a 503 without a time would be asked again at
    once, or never.
    """
    if not isinstance(error, lib.Unavailable):
        return None
    return _SOON if error.retry_after is None and status_of(error) == 503 else error.retry_after


def openai_error(error: lib.IronclipError) -> dict[str, Any]:
    """Return the error in OpenAI's shape."""
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    pointer = error.pointer
    if isinstance(error, RequestInvalid) and error.errors:
        pointer = error.errors[0]["pointer"]
    param = pointer.strip("/").replace("/", ".") if pointer else None
    return {"error": {"message": error.detail, "type": kind, "param": param or None, "code": error.code}}


def oip_error(error: lib.IronclipError) -> dict[str, str]:
    """Return the error in the Open Inference Protocol's shape: one text, which says where as well."""
    where = ""
    for part in (error.pointer or "").split("/")[1:]:
        where += f"[{part}]" if part.isdigit() else f".{part}" if where else part
    return {"error": f"{where}: {error.detail}" if where else error.detail}


def error_response(error: lib.IronclipError, path: str, request_id: str | None) -> Response:
    """Return the response for an error: OpenAI's shape below `/v1`, OIP's below `/v2`, a problem elsewhere."""
    headers: dict[str, str] = {}
    wait = retry_after(error)
    if wait is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait)))
    if isinstance(error, AccessDenied):
        headers["WWW-Authenticate"] = error.challenge
    if path.startswith("/v1/"):
        return Response(to_json(openai_error(error)), status_of(error), headers, "application/json")
    if path == "/v2" or path.startswith("/v2/"):
        return Response(to_json(oip_error(error)), status_of(error), headers, "application/json")
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


async def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler for everything that has a place in the table (registered for each family).

    A coroutine, like the other: Starlette runs what is none in a thread, which a refusal would have to wait for.
    """
    known = as_ironclip(error)
    # Not the URL's: that is put together of the Host and the query too, and where these are none it has none.
    response = error_response(known, request.scope["path"], getattr(request.state, "request_id", None))
    request.state.error_code = known.code
    if isinstance(known, lib.Overloaded):
        telemetry.DROPPED.labels("overload").inc()
        telemetry.REFUSED.labels(known.limit_name).inc()
    elif isinstance(known, lib.DeadlineExceeded):
        telemetry.DROPPED.labels("deadline").inc()
    if isinstance(error, HTTPException) and error.headers and "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def handle_gone(request: Request, error: Exception) -> Response:
    """Exception handler for a caller who has gone: nobody reads this; 499 is what the log and the metrics call it.

    Counted here, where all of them come by: those who broke off while they sent, and those who did not wait.
    """
    telemetry.DROPPED.labels("disconnect").inc()
    return Response(status_code=499)


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

"""The errors that the service adds to Ironclip's tree, and the one table from error class to HTTP status."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from ironclip import errors as lib
from service.settings import SettingsInvalid


class BodyMalformed(lib.InputError):
    """The body is not what its Content-Type says (JSON, UTF-8, a multipart form), or the query is not UTF-8."""

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


class NotAcceptable(lib.InputError):
    """The request's `Accept` takes none of the media types that this route answers in."""

    code = "not-acceptable"
    title = "No form of the answer is acceptable"


class ContentEncodingUnsupported(lib.InputError):
    """The body is compressed: bodies are counted as they arrive, so they must arrive plain."""

    code = "content-encoding-unsupported"
    title = "The content encoding is not supported"


class ImageTypeMismatch(lib.ImageUnsupported):
    """The media type that is declared for the picture is not that of its bytes, or not one that is accepted."""

    code = "image-type-mismatch"
    title = "The image is not of the declared type"


class ImageUrlRefused(lib.ImageError):
    """This URL is not fetched: its form, its host or its address is not allowed here. Which of them is not said."""

    code = "image-url-refused"
    title = "The image's URL is not fetched"


class ImageUrlFailed(lib.ImageError):
    """The URL gave no picture: the other side is away, slow, or answered something else. Trying again may help."""

    code = "image-url-failed"
    title = "The image could not be fetched"


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


class SpecForbidden(lib.InputError):
    """The encoder may not be loaded over the network: IRONCLIP_MODEL_SPECS and IRONCLIP_MODELS_DIR say what may."""

    code = "encoder-spec-forbidden"
    title = "This encoder may not be loaded here"


class EncoderBusy(lib.Conflict):
    """The encoder is being loaded, or too many are: wait until that has ended, one way or the other."""

    code = "encoder-busy"
    title = "The encoder is being loaded"


class EncoderInUse(lib.Conflict):
    """The default encoder and the last one cannot be unloaded; load another in their place."""

    code = "encoder-in-use"
    title = "The encoder cannot be unloaded"


class VersionLost(lib.IronclipError):
    """A version of an encoder was taken out of service, since its worker died, hung or gave nothing but faults."""

    code = "encoder-version-lost"
    title = "The version was taken out of service"


class ProbeNotFound(lib.NotFound):
    """No probe of this id is known: it never was, or it has been forgotten since its end."""

    code = "probe-not-found"
    title = "There is no such probe"


class IdempotencyConflict(lib.Unavailable):
    """The first request with this Idempotency-Key is still being taken in: `Retry-After` says when to ask again."""

    code = "idempotency-conflict"
    title = "The first request with this key is still being taken in"


class IdempotencyKeyReused(lib.InputError):
    """The Idempotency-Key came with another request before; a key is for one request and its repetitions."""

    code = "idempotency-key-reused"
    title = "The key belongs to another request"


class TooManyLabelSets(lib.Conflict):
    """As many label sets are registered as the service keeps; delete one, or put a new version of one."""

    code = "too-many-label-sets"
    title = "Too many label sets are registered"


class WorkerLost(lib.Unavailable):
    """A model worker could not be brought back; the process ends, so that it can be started anew."""

    code = "worker-lost"
    title = "A model worker is lost"


class AccessDenied(lib.IronclipError):
    """The request may not be answered to whoever sent it.

    Attributes:
        challenge: the value of `WWW-Authenticate` (RFC 6750).
    """

    code = "access-denied"
    title = "Access denied"

    def __init__(self, detail: str, *, challenge: str = "") -> None:
        super().__init__(detail)
        self.challenge = 'Bearer realm="ironclip"' + (f", {challenge}" if challenge else "")


class KeyMissing(AccessDenied):
    """This service wants an API key, in `Authorization: Bearer` or in `X-API-Key`."""

    code = "key-missing"
    title = "An API key is needed"


class KeyUnknown(AccessDenied):
    """The API key is not one of this service's."""

    code = "key-unknown"
    title = "The API key is not known"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, challenge='error="invalid_token"')


class KeyExpired(KeyUnknown):
    """The API key was one of this service's, until it expired."""

    code = "key-expired"
    title = "The API key has expired"


class ScopeMissing(AccessDenied):
    """The API key is known, and does not allow this."""

    code = "scope-missing"
    title = "The API key does not allow this"


class RateLimited(lib.Unavailable):
    """The API key's points are spent; they come back at its rate, and `Retry-After` says when there are enough."""

    code = "rate-limited"
    title = "The API key's rate limit is reached"


class CostTooHigh(lib.InputError):
    """The request costs more points than the API key can ever have at once: ask for less in one request."""

    code = "cost-too-high"
    title = "The request costs more than the API key allows at once"


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
    lib.GoldenMismatch: 500,
    lib.ArtifactError: 500,
    lib.Unavailable: 503,
    lib.Overloaded: 429,
    lib.NotReady: 503,
    lib.OutOfMemory: 503,
    lib.DeadlineExceeded: 504,
    SettingsInvalid: 500,
    BodyMalformed: 400,
    RequestInvalid: 422,
    MediaTypeUnsupported: 415,
    NotAcceptable: 406,
    ContentEncodingUnsupported: 415,
    ImageTypeMismatch: 415,
    ImageUrlRefused: 422,
    ImageUrlFailed: 424,
    RouteNotFound: 404,
    SpecForbidden: 403,
    EncoderBusy: 409,
    EncoderInUse: 409,
    VersionLost: 500,
    ProbeNotFound: 404,
    IdempotencyConflict: 409,
    IdempotencyKeyReused: 422,
    WorkerLost: 503,
    MethodNotAllowed: 405,
    LabelSetReadOnly: 409,
    TooManyLabelSets: 409,
    AccessDenied: 403,
    KeyMissing: 401,
    KeyUnknown: 401,
    KeyExpired: 401,
    ScopeMissing: 403,
    RateLimited: 429,
    CostTooHigh: 413,
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

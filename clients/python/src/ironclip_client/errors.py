"""Every error that this client raises, as one tree; an answer's error is told by the `code` of its problem.

IronclipError
├── UsageError               the call cannot be sent as it is; nothing was sent
├── ConnectionFailed         no answer came: refused, broken off, or no such host
├── UnexpectedAnswer         something answered that does not speak as Ironclip does
├── InvalidRequest           the service cannot use what was sent
│   ├── ImageError           the picture cannot be used
│   ├── LabelError           labels, prompts, templates or the tree cannot be used
│   └── TooLarge             the request as a whole is over a limit
├── Unauthorized             no key, or one that is not known
├── Forbidden                the key may not do this
├── NotFound                 no such encoder, label set or probe
├── Conflict                 the stored state is not what was expected
├── Unavailable              a right request that cannot be answered now
│   ├── Overloaded           the queue is full
│   ├── RateLimited          this key has used up its share
│   ├── NotReady             still loading, draining, or a worker is down
│   └── DeadlineExceeded     the time that was allowed is up
├── ProbeCancelled           the probe was cancelled before it had an answer
└── ServerError              a fault of the service
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One fault of a request: where it is (JSON Pointer), its code, and what is wrong."""

    pointer: str
    code: str
    detail: str


@dataclass(frozen=True)
class Problem:
    """An error as the service tells it (RFC 9457); `raw` has all of it."""

    code: str
    title: str
    detail: str
    status: int
    errors: tuple[Fault, ...] = ()
    limit: float | None = None
    limit_name: str = ""
    retry_after: float | None = None
    request_id: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def parse(cls, data: object, status: int = 0) -> Problem | None:
        """Read a problem's JSON; None for anything that is not one of Ironclip's."""
        if not isinstance(data, Mapping) or not isinstance(data.get("code"), str):
            return None
        wait = _number(data.get("retry_after_ms"))
        own_status = _number(data.get("status"))
        return cls(
            code=data["code"],
            title=str(data.get("title", "")),
            detail=str(data.get("detail", "")),
            status=status if own_status is None else int(own_status),
            errors=tuple(
                Fault(*(str(one.get(key, "")) for key in ("pointer", "code", "detail")))
                for one in _list(data.get("errors"))
                if isinstance(one, Mapping)
            ),
            limit=_number(data.get("limit")),
            limit_name=str(data.get("limit_name", "")),
            retry_after=None if wait is None else max(0.0, wait / 1000),
            request_id=str(data.get("instance", "")).removeprefix("urn:request:"),
            raw=data,
        )


class IronclipError(Exception):
    """Base of all errors of this client.

    Attributes:
        detail: what is wrong, and what to do.
        problem: what the service said, if it was the service.
        status: HTTP status of the answer; None where none came.
        request_id: under which the service's log has it; "" if not known.
        retry_after: seconds after which it is worth asking again, where the service said so.
        tries: how often it was asked.
    """

    tries = 1

    def __init__(
        self,
        detail: str,
        *,
        problem: Problem | None = None,
        status: int | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.problem = problem
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after

    @property
    def code(self) -> str:
        """The problem's stable code, such as `image-invalid`; "" where the service said nothing."""
        return self.problem.code if self.problem is not None else ""

    @property
    def errors(self) -> tuple[Fault, ...]:
        """The faults that the service listed, each with its place in the request."""
        return self.problem.errors if self.problem is not None else ()

    @property
    def limit(self) -> float | None:
        """The limit that was passed, where there is one."""
        return self.problem.limit if self.problem is not None else None

    def __str__(self) -> str:
        about = [self.code] if self.code else [f"HTTP {self.status}"] if self.status else []
        if self.request_id:
            about.append(f"request {self.request_id}")
        if self.tries > 1:
            about.append(f"{self.tries} tries")
        return f"{self.detail} ({', '.join(about)})" if about else self.detail

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with arguments by name are not pickled by themselves, and process pools send them that way.
        return type(self), (self.detail,), self.__dict__


class UsageError(IronclipError, ValueError):
    """The call cannot be sent as it is; nothing was sent."""


class ConnectionFailed(IronclipError):
    """No answer came: refused, broken off, or no such host."""


class UnexpectedAnswer(IronclipError):
    """Something answered that does not speak as Ironclip does: another server, or a gateway before it."""


class InvalidRequest(IronclipError):
    """The service cannot use what was sent; `errors` says which part."""


class ImageError(InvalidRequest):
    """The picture cannot be used."""


class LabelError(InvalidRequest):
    """Labels, prompts, templates or the tree cannot be used."""


class TooLarge(InvalidRequest):
    """The request as a whole is over a limit."""


class Unauthorized(IronclipError):
    """No key, or one that the service does not know; set `api_key` or IRONCLIP_API_KEY."""


class Forbidden(IronclipError):
    """The key may not do this."""


class NotFound(IronclipError):
    """No such encoder, label set or probe."""


class Conflict(IronclipError):
    """The stored state is not what was expected, or may not be changed."""


class Unavailable(IronclipError):
    """A right request that cannot be answered now; `retry_after` says when to ask again, if that is known."""


class Overloaded(Unavailable):
    """The service's queue is full."""


class RateLimited(Unavailable):
    """This key has used up its share of the service."""


class NotReady(Unavailable):
    """The service is still loading, draining, or a worker of it is down."""


class DeadlineExceeded(Unavailable):
    """The time that was allowed is up, here or at the service."""


class ProbeCancelled(IronclipError):
    """The probe was cancelled before it had an answer."""


class ServerError(IronclipError):
    """A fault of the service; its log has it under `request_id`."""


_BY_CODE: dict[str, type[IronclipError]] = {
    "labels-invalid": LabelError,
    "labels-too-many": LabelError,
    "tree-invalid": LabelError,
    "input-too-large": TooLarge,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "overloaded": Overloaded,
    "rate-limited": RateLimited,
    "not-ready": NotReady,
    "idempotency-conflict": Unavailable,
    "deadline-exceeded": DeadlineExceeded,
}
_BY_STATUS: dict[int, type[IronclipError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    413: TooLarge,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
}


def error_kind(code: str, status: int) -> type[IronclipError]:
    """The class for a problem's code; for codes that are newer than this client, that of the status."""
    if code in _BY_CODE:
        return _BY_CODE[code]
    if code.startswith("image-"):
        return ImageError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return InvalidRequest if 400 <= status < 500 else ServerError


def from_problem(problem: Problem, *, request_id: str = "", retry_after: float | None = None) -> IronclipError:
    """The error that a problem stands for."""
    wait = problem.retry_after if problem.retry_after is not None else retry_after
    return error_kind(problem.code, problem.status)(
        problem.detail or problem.title or problem.code,
        problem=problem,
        status=problem.status,
        request_id=problem.request_id or request_id,
        retry_after=wait,
    )


def from_response(status: int, headers: Mapping[str, str], body: bytes) -> IronclipError:
    """The error that an answer stands for: the service's own, or that of a gateway before it."""
    data = _json(body)
    problem = Problem.parse(data, status)
    request_id, wait = headers.get("x-request-id", ""), parse_retry_after(headers.get("retry-after", ""))
    if problem is not None:
        return from_problem(problem, request_id=request_id, retry_after=wait)
    if status == 503 and isinstance(data, Mapping) and isinstance(data.get("reason"), str):  # of /readyz
        return NotReady(data["reason"], status=status, request_id=request_id, retry_after=wait)
    found = body[:200].decode("utf-8", "replace").strip()
    said = " ".join(re.sub(r"<[^>]*>?", " ", found).split())
    kind = _BY_STATUS.get(status, UnexpectedAnswer)
    detail = f"HTTP {status}, and not in Ironclip's words" + (f": {said}" if said else "")
    if kind is UnexpectedAnswer or status == 404:
        detail += ". Is base_url the address of an Ironclip service?"
    return kind(detail, status=status, request_id=request_id, retry_after=wait)


def not_now(error: IronclipError) -> bool:
    """Whether the service could not be asked, or said no for now; a gateway may say so for it (500, 502, 504)."""
    return isinstance(error, (Unavailable, ConnectionFailed)) or error.status in (500, 502, 503, 504)


def parse_retry_after(value: str) -> float | None:
    """Seconds from a `Retry-After` header: a number, or a date (RFC 9110, section 10.2.3); None if neither."""
    value = value.strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]

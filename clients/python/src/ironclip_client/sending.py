"""One call from its first try to its last: deadlines, what may be sent again and when, and errors in our own words."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from ironclip_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    IronclipError,
    NotReady,
    Unavailable,
    UnexpectedAnswer,
    UsageError,
    from_response,
)
from ironclip_client.results import Meta
from ironclip_client.version import VERSION
from ironclip_client.wire import Call, Reply

# Between two looks at whether a service is ready, seconds.
READY_PAUSE = 0.25
DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS = 5.0
# The service closes an idle connection after 75 seconds, balancers before it often after 60: not to be met half-way,
# ours are given up earlier. What was closed sooner all the same is seen before it is used again; where the two cross,
# what only computes is sent once more (`Tries.after`). The rest is not: nobody knows whether it was heeded.
_KEEP_ALIVE_SECONDS = 50.0
# Kept back of the time that the service is told of, so that its answer arrives before ours is up.
_MARGIN_SHARE, _MARGIN_SECONDS = 0.05, 0.25
_MAX_SECONDS = 1_000_000.0
_MAYBE = " It may have been heeded all the same, so it was not sent again."
# Nothing has reached the service yet.
_NOT_BEGUN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is sent again, and after how long; exponential, with full jitter.

    Attributes:
        max_retries: tries after the first at most; 0 for none.
        base: seconds before the second try at most, without a `Retry-After`.
        cap: seconds between two tries at most, without a `Retry-After`.
    """

    max_retries: int = 4
    base: float = 0.25
    cap: float = 8.0

    def wait(self, retries: int, retry_after: float | None) -> float:
        """Seconds before the next try: never less than the service asks for, and jitter on top of it."""
        jitter = random.uniform(0, min(self.cap, self.base * 2.0 ** min(retries, 60)))
        return jitter if retry_after is None else retry_after + jitter


@dataclass(frozen=True)
class Config:
    """Where the service is and how it is asked; the key is not shown."""

    base_url: str
    timeout: float
    retry: RetryPolicy
    headers: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout: float,
        retry: RetryPolicy | int,
        headers: Mapping[str, str] | None,
    ) -> Config:
        """Check the arguments; IRONCLIP_URL and IRONCLIP_API_KEY stand in for those that are None.

        Raises:
            UsageError: one of them cannot be used.
        """
        # Names of headers are the same in any case: what the caller says takes the place of what is usual.
        every = httpx.Headers({"User-Agent": f"ironclip-client/{VERSION}", "Accept": "application/json"})
        every.update(headers)
        authorised = "Authorization" in every
        key = os.environ.get("IRONCLIP_API_KEY", "").strip() if api_key is None and not authorised else api_key
        if key:
            if not re.fullmatch(r"[\x21-\x7e]+", key):
                raise UsageError("An API key has no blanks, line ends or letters beyond ASCII.")
            every["Authorization"] = f"Bearer {key}"
        policy = RetryPolicy(max_retries=retry) if isinstance(retry, int) else retry
        if policy.max_retries < 0:
            raise UsageError("retries is 0 or more.")
        return cls(_checked_url(base_url), checked_seconds(timeout), policy, dict(every))


def limits() -> httpx.Limits:
    """Of the connections that a client keeps."""
    return httpx.Limits(max_connections=100, max_keepalive_connections=32, keepalive_expiry=_KEEP_ALIVE_SECONDS)


def checked_seconds(value: float) -> float:
    """A timeout in seconds; raises UsageError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UsageError(f"A timeout is a number of seconds above 0, not {value!r}.")
    return min(float(value), _MAX_SECONDS)


def _checked_url(base_url: str | None) -> str:
    given = (base_url if base_url is not None else os.environ.get("IRONCLIP_URL", "").strip() or DEFAULT_URL).rstrip(
        "/"
    )
    try:
        url = httpx.URL(given)
    except (httpx.InvalidURL, TypeError) as error:
        raise UsageError(f"The service's address cannot be read: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError("The service's address is like http://host:8000, without a query.")
    if url.userinfo:
        raise UsageError("Put no password into the service's address; a key goes into api_key or IRONCLIP_API_KEY.")
    return given


class Tries:
    """The tries of one call, within one budget of time.

    Args:
        config: of the client.
        call: what is asked.
    """

    def __init__(self, config: Config, call: Call[Any]) -> None:
        self._config, self._call = config, call
        self.seconds = checked_seconds(call.timeout) if call.timeout is not None else config.timeout
        self._end = time.monotonic() + self.seconds
        self.retries = 0

    @property
    def left(self) -> float:
        """Seconds until the time is up; not below 0."""
        return max(0.0, self._end - time.monotonic())

    def request(self) -> dict[str, Any]:
        """The next try, as httpx takes it: its own timeout, and the time that the service is told of."""
        call, left = self._call, max(0.001, self.left)
        told = max(1, int(1000 * (left - min(_MARGIN_SECONDS, _MARGIN_SHARE * left))))
        headers = httpx.Headers(self._config.headers)
        headers["X-Request-Timeout-Ms"] = str(told)
        headers.update(call.headers)
        return {
            "method": call.method,
            "url": self._config.base_url + call.path,
            "params": list(call.params) or None,
            "headers": headers,
            "content": call.content,
            "data": call.data,
            "files": call.files,
            "timeout": httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS)),
        }

    def check(self) -> None:
        """Between two parts of a body: raises DeadlineExceeded if the time is up."""
        if not self.left:
            raise self._exceeded()

    def reply(self, response: httpx.Response, body: bytes) -> Reply:
        """The answer; raises the error that it is, if it is one."""
        headers = {name.lower(): value for name, value in response.headers.items()}
        if response.status_code != 304 and not 200 <= response.status_code < 300:
            raise from_response(response.status_code, headers, body)
        meta = Meta(
            request_id=headers.get("x-request-id", ""),
            cache_status=headers.get("cache-status", ""),
            server_timing=headers.get("server-timing", ""),
            retries=self.retries,
        )
        return Reply(response.status_code, headers, body, meta)

    def after(self, error: Exception) -> float:
        """Seconds to wait before the call is sent again.

        Raises:
            IronclipError: it is not to be, or there is no time for it: the error in our own words.
        """
        ours = error if isinstance(error, IronclipError) else self._told(error)
        ours.tries = self.retries + 1
        wait = self._config.retry.wait(self.retries, ours.retry_after)
        again = self.retries < self._config.retry.max_retries and self._may_repeat(error)
        if not again or wait >= self.left:
            if ours is not error:
                raise ours from error
            if self._call.again == "refused" and ours.status in (502, 503, 504) and not self._may_repeat(error):
                ours.detail += _MAYBE  # a gateway, or a store behind the service, that lost sight of it
            raise ours
        self.retries += 1
        return wait

    def _may_repeat(self, error: Exception) -> bool:
        safe = self._call.again == "safe"
        if self._call.again == "never":
            return False
        if isinstance(error, _NOT_BEGUN):
            return "CERTIFICATE_VERIFY_FAILED" not in str(error)
        if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
            return safe
        if not isinstance(error, IronclipError):
            return False
        if error.status == 429:
            return True
        if error.problem is None:  # a gateway that did not reach the service, or lost it
            return safe and error.status in (502, 503, 504)
        if isinstance(error, NotReady):
            return True
        # A service that has used the time up would do so again.
        return safe and isinstance(error, Unavailable) and not isinstance(error, DeadlineExceeded)

    def _told(self, error: Exception) -> IronclipError:
        if isinstance(error, httpx.ConnectTimeout) or not isinstance(error, httpx.TimeoutException):
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
                return UsageError(f"The request cannot be sent: {text}")
            if isinstance(error, httpx.DecodingError):
                return UnexpectedAnswer(f"The answer cannot be read: {text}")
            hint = "" if self._call.again != "refused" or isinstance(error, _NOT_BEGUN) else _MAYBE
            return ConnectionFailed(f"No answer from {self._config.base_url}: {text}.{hint}")
        return self._exceeded()

    def _exceeded(self) -> DeadlineExceeded:
        hint = _MAYBE if self._call.again == "refused" else ""
        return DeadlineExceeded(f"No answer from {self._config.base_url} within {self.seconds:g} s.{hint}")

"""Whole answers by what was asked, byte for byte: a request that is repeated is not even taken apart.

An answer is kept when every picture in it came from the caches. It is given again only while the names in the request
stand for what they stood for: the same version of the encoder, the same digest of the label set. What each request is
asked for all the same is asked for: its key, its points, its place in the log and in the metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from cachetools import TTLCache
from starlette.types import Receive, Scope, Send

from ironclip.errors import IronclipError
from service import telemetry
from service.label_sets import Registered
from service.runtime import ServedEncoder

NAME = "answers"
# An answer larger than this is made anew: a few of them would drive out all others.
_MAX_ANSWER_BYTES = 256 * 1024
_OVERHEAD = 1000  # bytes of Python objects around one answer, roughly


@dataclass(frozen=True)
class Terms:
    """What an answer holds under.

    Attributes:
        encoder: as the request named it.
        serial: of the version that it was given.
        label_set: as the request named it; None where it named none.
        digest: of the set that it was given.
        points: that it cost.
    """

    encoder: str
    serial: int
    label_set: str | None = None
    digest: str = ""
    points: float = 0.0


@dataclass(frozen=True)
class Remembered:
    """An answer, and what it holds under."""

    terms: Terms
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": self.body})


class Memory:
    """The answers of recent requests.

    Args:
        encoder: a name to what is served under it, as `Service.encoder`.
        label_set: a name and a tenant to what is registered, as `LabelSets.get`.
        max_bytes: of all answers; 0 keeps none.
        ttl: seconds that an answer is kept.
    """

    def __init__(
        self,
        encoder: Callable[[str], ServedEncoder],
        label_set: Callable[[str, str], Awaitable[Registered]],
        max_bytes: int,
        ttl: float,
    ) -> None:
        self.enabled = max_bytes > 0
        self._encoder = encoder
        self._label_set = label_set
        self._max_bytes = max_bytes
        self._kept: TTLCache[bytes, Remembered] = TTLCache(max(max_bytes, 1), ttl, getsizeof=_size)

    async def find(self, key: bytes, tenant: str) -> Remembered | None:
        """The answer to a request of this key, if there is one that still holds."""
        found = self._kept.get(key)
        fits = found is not None and await self._holds(found.terms, tenant)
        telemetry.count_cache(NAME, "hit" if fits else "miss")
        return found if fits else None

    def keep(self, key: bytes, terms: Terms, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep an answer, with the headers that its route gave it."""
        remembered = Remembered(terms, body, tuple(headers))
        if len(body) <= _MAX_ANSWER_BYTES and _size(remembered) <= self._max_bytes:
            self._kept[key] = remembered
            telemetry.CACHE_BYTES.labels(NAME).set(self._kept.currsize)

    async def _holds(self, terms: Terms, tenant: str) -> bool:
        """Whether names stand for what they stood for; what is wrong with one is told by who makes the answer anew."""
        try:
            if self._encoder(terms.encoder).serial != terms.serial:
                return False
            return terms.label_set is None or (await self._label_set(terms.label_set, tenant)).digest == terms.digest
        except IronclipError:
            return False


def request_key(tenant: str, asked: Sequence[str], query: bytes) -> bytes:
    """SHA-256 of all that a request for pictures says.

    Args:
        tenant: whose it is.
        asked: path, types of the body and of the answer, the body's digest; none holds a NUL.
        query: as it came.
    """
    said = "\0".join((tenant, *asked)).encode()
    return hashlib.sha256(said + b"\0" + query).digest()


def _size(remembered: Remembered) -> int:
    return _OVERHEAD + len(remembered.body)

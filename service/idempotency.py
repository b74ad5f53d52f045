"""Keys that make a request safe to send again: the second with the same `Idempotency-Key` begins nothing new.

After draft-ietf-httpapi-idempotency-key-header-07. Only where a request leaves something behind that goes on by
itself: a probe that is answered 202. A key lives as long as what it began, is its tenant's own, and with a Redis is
known to every replica; while Redis is away, to its own alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio import Redis

from service.errors import IdempotencyConflict, IdempotencyKeyReused, RequestInvalid
from service.redis_link import RedisLink, RedisUnavailable
from service.seal import NotSigned, Seal

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
_CALL = 1.0  # for one call to Redis, seconds
_MARGIN = 1.0  # beyond the time in which the first request has to be taken in
# A string of RFC 8941 without escapes, as the draft has it; or the same without its quotes, as most send it.
_FORM = re.compile(r'"([\x20\x21\x23-\x5b\x5d-\x7e]{1,255})"|([\x21\x23-\x7e]{1,255})')


def read_key(value: str | None) -> str | None:
    """The key of an `Idempotency-Key` header; raises RequestInvalid for what is none."""
    if value is None:
        return None
    found = _FORM.fullmatch(value.strip())
    if found is None:
        raise RequestInvalid(f'{HEADER} is a string of 1 to 255 printable ASCII characters, such as "8e03978e-40d5".')
    return found[1] or found[2]


@dataclass(frozen=True)
class Claim:
    """What a key stands for: the digest of the request that came with it, and the id of what that began.

    Attributes:
        place: where it is kept in Redis.
        digest: of the request.
        identity: of what it began, or would begin.
        repeated: another request came first.
    """

    place: str
    digest: str
    identity: str
    repeated: bool = False


class Claims:
    """The keys that are in use.

    Args:
        link: to Redis, if there is one.
        prefix: of every key there.
        secret: signs entries, so that another writer to Redis cannot plant any; may be empty.
        lives: whether what a tenant's request began, by its id, is still known in this process.
    """

    def __init__(self, link: RedisLink | None, prefix: str, secret: bytes, lives: Callable[[str, str], bool]) -> None:
        self._link, self._prefix, self._lives = link, prefix, lives
        self._seal = Seal(secret, b"idempotency")
        # Until when, by the monotonic clock, a key is kept that has begun nothing yet.
        self._own: dict[tuple[str, str], tuple[Claim, float]] = {}

    async def claim(self, tenant: str, key: str, digest: str, identity: str, seconds: float) -> Claim:
        """Say that this request is the first with its key, or find out which was.

        Args:
            tenant: whose key.
            key: as `read_key` has it.
            digest: of the request.
            identity: of what it would begin.
            seconds: within which that has begun, or never will.

        Returns:
            The claim that holds: this request's, or that of the first, which it repeats.

        Raises:
            IdempotencyKeyReused: the key came with another request before.
        """
        self._drop()
        name = hashlib.sha256(key.encode()).hexdigest()
        place = f"{self._prefix}:tenant:{tenant}:idempotency:{name}" if tenant else f"{self._prefix}:idempotency:{name}"
        mine = Claim(place, digest, identity)
        known = self._own.get((tenant, place))
        if known is None:
            until = seconds + _MARGIN
            self._own[tenant, place] = (mine, time.monotonic() + until)
            holds = await self._shared(mine, until)
            if holds.repeated:  # it is another replica's
                self._own.pop((tenant, place), None)
        else:
            holds = replace(known[0], repeated=True)
        if holds.digest != digest:
            raise IdempotencyKeyReused(
                f"This {HEADER} came with another request before. A key is for one request and its repetitions: "
                "make a new one for a new request."
            )
        return holds

    async def release(self, tenant: str, claim: Claim) -> None:
        """Give a key up whose request began nothing, so that the next with it is the first again."""
        self._own.pop((tenant, claim.place), None)

        async def delete(redis: Redis) -> object:
            return await redis.delete(claim.place)

        if self._link is not None:
            with contextlib.suppress(RedisUnavailable):
                await self._link.call(delete, timeout=_CALL)

    def _drop(self) -> None:
        """Forget keys of what is not known any more."""
        now = time.monotonic()
        gone = [
            place
            for place, (claim, until) in self._own.items()
            if now > until and not self._lives(claim.identity, place[0])
        ]
        for place in gone:
            del self._own[place]

    async def _shared(self, mine: Claim, seconds: float) -> Claim:
        """The claim that holds among all replicas; this one where Redis has none, or is away."""
        if self._link is None:
            return mine
        entry = self._seal.close(mine.place, json.dumps([mine.digest, mine.identity]).encode())

        async def put(redis: Redis) -> bytes | None:
            if await redis.set(mine.place, entry, nx=True, px=round(1000 * seconds)):
                return None
            found: Any = await redis.get(mine.place)
            return bytes(found) if found is not None else None

        try:
            found = await self._link.call(put, timeout=_CALL)
        except RedisUnavailable:
            return mine
        with contextlib.suppress(NotSigned, ValueError, RecursionError, TypeError):
            if found is not None:
                digest, identity = json.loads(self._seal.open(mine.place, found))
                if isinstance(digest, str) and isinstance(identity, str):
                    return Claim(mine.place, digest, identity, repeated=True)
        return mine


def still_coming() -> IdempotencyConflict:
    """The error for a repetition that overtakes the first."""
    return IdempotencyConflict(
        f"The first request with this {HEADER} is still being taken in: ask again in a second.", retry_after=1
    )

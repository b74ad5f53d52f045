"""Keys that make a request safe to send again: the second with the same `Idempotency-Key` begins nothing new.

After draft-ietf-httpapi-idempotency-key-header-07. Only where a request leaves something behind that goes on by
itself: a probe that is answered 202. A key stands for what it began for a day, or as long as that is known where this
is longer: a queue that delivers a request once more after hours starts nothing that is paid for again. It is its
tenant's own, and with a Redis known to every replica; while Redis is away, to its own alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from redis.asyncio import Redis

from service.errors import IdempotencyConflict, IdempotencyKeyReused, RequestInvalid
from service.redis_link import RedisLink, RedisUnavailable
from service.seal import NotSigned, Seal

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
_CALL = 1.0  # for one call to Redis, seconds
_MARGIN = 1.0  # beyond the time in which the first request has to be taken in
_DAY = 24 * 3600
_MOST = 20_000  # keys kept in this process, about half a kilobyte each; each of them began a probe
# Takes a claim away, if it is this one. In one step, or another replica's could come in between.
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
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
        begun: what is of this id has begun, so if it is not known now it has been forgotten.
    """

    place: str
    digest: str
    identity: str
    repeated: bool = False
    begun: bool = False


class Kept(NamedTuple):
    """A claim as Redis has it from when its request has begun something: where, what, and for how many seconds."""

    place: str
    entry: bytes
    seconds: int


class Claims:
    """The keys that are in use.

    Args:
        link: to Redis, if there is one.
        prefix: of every key there.
        secret: signs entries, so that another writer to Redis cannot plant any; may be empty.
        lives: whether what a tenant's request began, by its id, is still known in this process.
        most: keys kept in this process at most; the oldest make way.
    """

    def __init__(
        self,
        link: RedisLink | None,
        prefix: str,
        secret: bytes,
        lives: Callable[[str, str], bool],
        most: int = _MOST,
    ) -> None:
        self._link, self._prefix, self._lives, self._most = link, prefix, lives, most
        self._seal = Seal(secret, b"idempotency")
        # Each with the time, by the monotonic clock, until which it is kept; the oldest first.
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
        name = hashlib.sha256(key.encode()).hexdigest()
        place = f"{self._prefix}:tenant:{tenant}:idempotency:{name}" if tenant else f"{self._prefix}:idempotency:{name}"
        mine = Claim(place, digest, identity)
        known = self._known(tenant, place)
        if known is None:
            self._own.pop((tenant, place), None)
            self._drop()
            until = seconds + _MARGIN
            self._own[tenant, place] = (mine, time.monotonic() + until)
            holds = await self._shared(mine, until)
            if holds.repeated:  # it is another replica's
                self._own.pop((tenant, place), None)
        else:
            holds = replace(known, repeated=True)
        if holds.digest != digest:
            raise IdempotencyKeyReused(
                f"This {HEADER} came with another request before. A key is for one request and its repetitions: "
                "make a new one for a new request."
            )
        return holds

    async def release(self, tenant: str, claim: Claim) -> None:
        """Give a key up whose request began nothing, so that the next with it is the first again.

        Another's claim stays: this one may have run out since, or Redis may never have heard of it.
        """
        held, _ = self._own.get((tenant, claim.place), (None, 0.0))
        if held is not None and held.identity == claim.identity:
            del self._own[tenant, claim.place]
        entry = self._entry(claim)

        async def delete(redis: Redis) -> object:
            return await redis.register_script(_RELEASE)([claim.place], [entry])

        if self._link is not None:
            with contextlib.suppress(RedisUnavailable):
                await self._link.call(delete, timeout=_CALL)

    def keep(self, tenant: str, claim: Claim) -> Kept:
        """Let a key stand for what its request has begun; returns what the other replicas are to find."""
        begun = replace(claim, begun=True)
        self._own.pop((tenant, claim.place), None)
        self._own[tenant, claim.place] = (begun, time.monotonic() + _DAY)
        return Kept(claim.place, self._entry(begun), _DAY)

    def _known(self, tenant: str, place: str) -> Claim | None:
        """The claim that this process keeps under a key."""
        claim, until = self._own.get((tenant, place), (None, 0.0))
        if claim is not None and time.monotonic() > until and not self._lives(claim.identity, tenant):
            return None
        return claim

    def _drop(self) -> None:
        """Forget the oldest keys, as long as they stand for nothing any more or there are too many."""
        while self._own:
            tenant, place = next(iter(self._own))
            if len(self._own) < self._most and self._known(tenant, place) is not None:
                return
            del self._own[tenant, place]

    def _entry(self, claim: Claim) -> bytes:
        return self._seal.close(claim.place, json.dumps([claim.digest, claim.identity, claim.begun]).encode())

    async def _shared(self, mine: Claim, seconds: float) -> Claim:
        """The claim that holds among all replicas; this one where Redis has none, or is away."""
        if self._link is None:
            return mine
        entry = self._entry(mine)

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
                digest, identity, begun = json.loads(self._seal.open(mine.place, found))
                if isinstance(digest, str) and isinstance(identity, str):
                    return Claim(mine.place, digest, identity, repeated=True, begun=begun is True)
        return mine


def still_coming() -> IdempotencyConflict:
    """The error for a repetition that overtakes the first."""
    return IdempotencyConflict(
        f"The first request with this {HEADER} is still being taken in: ask again in a second.", retry_after=1
    )

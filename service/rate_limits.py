"""Rate limits in points: a token bucket for each API key, in Redis where there is one, else in this process.

A bucket holds `burst` points and is refilled at `points_per_minute`. What a request costs is known when it has been
read, and is taken before any work is done; `PICTURE`, `TEXT` and `PASS` are the prices. While Redis is away each
replica counts for itself: an outage makes limits looser, and refuses nobody.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from service import telemetry
from service.errors import CostTooHigh, RateLimited
from service.keys import Caller
from service.redis_link import RedisLink, RedisUnavailable
from service.together import is_paid_for

# Points of one forward of a picture, and of one text.
PICTURE, TEXT = 1.0, 0.25
# Forwards of the tower that a gradient through one of them comes to, with its backward; and points of one such forward
# in a probe, whose gradient costs what a picture does.
PASSES_A_GRADIENT = 3
PASS = PICTURE / PASSES_A_GRADIENT
# Labels and prompts beyond so many bytes are paid for by their bytes: to read them takes about as long as a picture.
_BYTES_A_POINT = 64 * 1024
# What Redis said is believed for so many seconds: others take points there, too, and give them back.
_FRESH = 1.0
# Takes points if they are there (negative ones are given back); returns whether, and how many are left. One step, by
# Redis' own clock: replicas neither race nor disagree about the time. Whatever another writer has put under the key
# comes out between an empty and a full bucket.
_SCRIPT = """
local burst, rate, points, ttl = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local held = redis.call('HMGET', KEYS[1], 'left', 'at')
local left, at = tonumber(held[1] or ''), tonumber(held[2] or '')
if not left or not at or left ~= left or at ~= at then left, at = burst, now end
if at > now then at = now end
left = math.max(0, math.min(burst, left + (now - at) * rate))
if points > left then return {0, string.format('%.6f', left)} end
left = math.min(burst, left - points)
if points ~= 0 then
  redis.call('HSET', KEYS[1], 'left', string.format('%.17g', left), 'at', string.format('%.17g', now))
  redis.call('PEXPIRE', KEYS[1], ttl)
end
return {1, string.format('%.6f', left)}
"""


def reading(size: int) -> float:
    """What it costs to read labels and options of so many bytes, in points; little costs nothing."""
    return PICTURE * (size // _BYTES_A_POINT)


@dataclass
class Bucket:
    """A token bucket in this process; does what the script does."""

    left: float
    at: float

    def take(self, points: float, burst: float, rate: float, now: float) -> bool:
        """Take points if they are there, at a rate of points a second; negative ones are given back."""
        self.left = max(0.0, min(burst, self.left + max(0.0, now - self.at) * rate))
        self.at = now
        if points > self.left:
            return False
        self.left = min(burst, self.left - points)
        return True


@dataclass(frozen=True)
class Taken:
    """What came of asking a bucket: whether the points were there, how many are left, and where it is kept."""

    paid: bool
    left: float
    store: str


class Limiter:
    """The buckets of all keys.

    Args:
        link: Redis, or None.
        prefix: front part of the keys in Redis.
    """

    def __init__(self, link: RedisLink | None, prefix: str) -> None:
        self._link = link
        self._prefix = f"{prefix}:rate:"
        self._here: dict[str, Bucket] = {}  # as many as there are limited keys
        self._seen: dict[str, Bucket] = {}  # as Redis had them last

    def spent(self, caller: Caller) -> Taken | None:
        """How the bucket stands of a caller who has not even the least that a request costs; else None.

        It is so as far as is known here: not where what was seen of it is old.
        """
        rate, now = (caller.points_per_minute or 0) / 60, time.monotonic()
        bucket = self._here.get(caller.key) if self._link is None else self._seen.get(caller.key)
        if bucket is None or (self._link is not None and now - bucket.at > _FRESH):
            return None
        left = bucket.left + (now - bucket.at) * rate
        return Taken(False, left, "local" if self._link is None else "redis") if left < TEXT else None

    async def take(self, caller: Caller, points: float, store: str = "") -> Taken:
        """Take points from the caller's bucket, or give them back to the ``store`` that they were taken from.

        Raises:
            RedisUnavailable: it cannot be given back to.
        """
        rate = (caller.points_per_minute or 0) / 60
        if self._link is not None and store in ("", "redis"):
            full_again = math.ceil(1000 * caller.burst / rate) + 1000
            arguments = (caller.burst, rate, points, full_again)

            async def ask(redis: Redis) -> Any:
                return await redis.register_script(_SCRIPT)([self._prefix + caller.key], arguments)

            try:
                paid, left = await self._link.call(ask)
                self._seen[caller.key] = Bucket(float(left), time.monotonic())
                return Taken(bool(paid), float(left), "redis")
            except RedisUnavailable:
                self._seen.pop(caller.key, None)
                if store:
                    raise
        now = time.monotonic()
        bucket = self._here.setdefault(caller.key, Bucket(caller.burst, now))
        paid = bucket.take(points, caller.burst, rate, now)
        return Taken(paid, bucket.left, "local" if self._link is None else "fallback")


class Meter:
    """What one request costs its caller; costs nothing where the caller is not limited.

    Args:
        limiter: the buckets.
        caller: who pays.
    """

    def __init__(self, limiter: Limiter, caller: Caller) -> None:
        self.caller = caller
        self._limiter = limiter
        self._last: Taken | None = None
        self.spent = 0.0  # points asked for and not given back, of whoever is not limited too

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.caller.points_per_minute is not None

    async def pay(self, points: float) -> str:
        """Take points before work is done; returns where from, for `give_back`.

        Raises:
            RateLimited: they are not there yet.
            CostTooHigh: there can never be so many.
        """
        caller = self.caller
        if points <= 0:
            return ""
        if not self.limited:
            self.spent += points
            return ""
        if points > caller.burst:
            raise CostTooHigh(
                f"This request costs {points:g} points, and at most {caller.burst} can be spent at once (burst of the "
                f"API key {caller.key} in the keys file): ask for less in one request, or have the limit raised.",
                limit=caller.burst,
            )
        self._last = taken = await self._limiter.take(caller, points)
        telemetry.RATE_LIMITS.labels(taken.store, "allowed" if taken.paid else "refused").inc()
        if taken.paid:
            self.spent += points
            return taken.store
        raise self._refusal("This request costs", points, taken.left)

    def check(self) -> None:
        """Refuse whoever has nothing left before the body is asked for: to read it is work, too.

        Raises:
            RateLimited: not even the least that a request costs is there.
        """
        spent = self._limiter.spent(self.caller) if self.limited else None
        if spent is not None:
            self._last = spent
            telemetry.RATE_LIMITS.labels(spent.store, "refused").inc()
            raise self._refusal("A request costs at least", TEXT, spent.left)

    def _refusal(self, costs: str, points: float, left: float) -> RateLimited:
        caller = self.caller
        return RateLimited(
            f"{costs} {points:g} points, and {left:.3g} of {caller.burst} are there; {caller.points_per_minute} a "
            f"minute come back (points_per_minute and burst of the API key {caller.key} in the keys file). Ask again "
            "later, or have the limit raised.",
            retry_after=(points - left) * 60 / (caller.points_per_minute or 1),
            limit=caller.burst,
        )

    async def give_back(self, points: float, store: str, *, again: bool = True) -> None:
        """Give back what was taken and not used; ``again`` as it was paid."""
        if points <= 0:
            return
        self.spent -= points if again else 0.0
        if store:
            with suppress(
                RedisUnavailable
            ):  # what Redis took and cannot be given back to it is no loss to anybody here
                self._last = await self._limiter.take(self.caller, -points, store)

    @asynccontextmanager
    async def paid(self, points: float, *, again: bool = True) -> AsyncIterator[str]:
        """Take points for the work inside; they come back if the service refuses or fails to do it.

        Says where they were taken from, for `give_back` of what is not used.

        They do not if the caller's time ran out, or the caller went away, or a picture turned out to be unreadable: the
        work was done as far as it went (`is_paid_for`). What the same request would not cost ``again`` is left out of
        `spent`.
        """
        store = await self.pay(points)
        once = 0.0 if again else max(0.0, points)
        self.spent -= once
        try:
            yield store
        except (Exception, asyncio.CancelledError) as error:
            if not is_paid_for(error):
                self.spent += once
                await self.give_back(points, store)
            raise

    async def headers(self) -> dict[str, str]:
        """The fields of draft-ietf-httpapi-ratelimit-headers-11; none for a caller without a limit.

        The window is the time in which an empty bucket is refilled, and `t` the time until this one is full.
        """
        caller = self.caller
        if caller.points_per_minute is None:
            return {}
        taken = self._last or await self._limiter.take(caller, 0)
        rate = caller.points_per_minute / 60
        full = math.ceil((caller.burst - taken.left) / rate)
        return {
            "RateLimit-Policy": f'"points";q={caller.burst};w={math.ceil(caller.burst / rate)}',
            "RateLimit": f'"points";r={math.floor(taken.left)};t={max(0, full)}',
        }


class Bill:
    """What a probe is paid with: all that it may use beforehand, and at its end the rest comes back.

    Args:
        meter: of the request that asks for it.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._units, self._each, self._store = 0, 0.0, ""

    async def pay(self, units: int, each: float) -> None:
        """Take the points for so many units; raises as `Meter.pay`."""
        self._store = await self._meter.pay(units * each)
        self._units, self._each = units, each

    async def settle(self, used: int) -> None:
        """Give back what was not used; once."""
        unused, self._units = self._units - used, 0
        await self._meter.give_back(self._each * unused, self._store)

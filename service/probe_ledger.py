"""Where probes can be asked for: those of this process, and through Redis those of the other replicas.

A probe's events are its state. With a Redis the last about each thing is written to a hash as it comes, so that any
replica can tell them again; a wish to cancel goes the other way, as a key that the probe's own replica looks for. While
a probe has not ended its replica gives a sign of life with it, a key that expires soon: without it for long enough, and
with somebody who asks meanwhile, the replica is gone and the probe has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis

from ironclip.errors import NotReady
from service.errors import ProbeNotFound
from service.idempotency import Kept
from service.probe_job import ENDS, Event, Job
from service.probe_list import BRIEF, Cursor, Elsewhere, Listed, Page, brief, enter, listed
from service.problems import problem
from service.redis_link import RedisLink, RedisUnavailable
from service.seal import NotSigned, Seal

_POLL = 0.25  # between looks at Redis, seconds
_CALL = 1.0  # for one call to Redis, seconds; nobody's classification waits for it
_LAST_TRIES = 240  # to write how a probe ended, a poll apart
# A sign of life lasts so long; and so long after its absence was first noticed the replica is taken for gone, unless it
# has said something since. Together more than a replica needs to find back to a Redis that was away.
_SIGN_SECONDS, _DOUBT_SECONDS = 5, 8
_DOUBT_KEPT = 60
_AWAY_SECONDS = 60.0  # that a follower waits for a Redis that is away, or that has lost the probe, before it gives up


class _Known(NamedTuple):
    """A probe of this process, and when it came: by the monotonic clock, and in milliseconds since 1970."""

    job: Job
    since: float
    created: int


class Ledger:
    """The probes that can be asked for, each by its own tenant alone.

    Args:
        link: to Redis, if there is one.
        prefix: of every key.
        secret: signs events, so that another writer to Redis cannot plant any; may be empty.
        ttl: seconds that an ended probe is remembered.
        most: ended probes remembered in this process at most.
        most_bytes: that these take at most, with their pictures; the oldest make way, as for the number.
    """

    def __init__(
        self,
        link: RedisLink | None,
        prefix: str,
        secret: bytes,
        ttl: int,
        most: int = 1024,
        most_bytes: int = 128 << 20,
    ) -> None:
        self._link, self._prefix, self._ttl = link, prefix, ttl
        self._most, self._most_bytes = most, most_bytes
        self._seal = Seal(secret, b"probes")
        self._jobs: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._mirrors: set[asyncio.Task[None]] = set()

    async def add(self, job: Job, tenant: str = "", beside: Kept | None = None) -> None:
        """Remember a tenant's probe of this process; returns when the other replicas know of it, or cannot.

        What is kept ``beside`` it in Redis is written with it, and expires no sooner.
        """
        self._make_room()
        known = self._jobs[tenant, job.id] = _Known(job, time.monotonic(), time.time_ns() // 1_000_000)
        if self._link is not None:
            known_of = asyncio.Event()
            task = asyncio.create_task(self._mirror(self._link, known, tenant, beside, known_of))
            self._mirrors.add(task)
            task.add_done_callback(self._mirrors.discard)
            task.add_done_callback(lambda _: known_of.set())
            await known_of.wait()

    def _make_room(self) -> None:
        """Forget what has expired, and of what else has ended the oldest beyond the bounds."""
        number, size = 1, 0  # the one that comes
        for known, (old, since, _) in reversed(list(self._jobs.items())):
            if not old.ended:
                continue
            number, size = number + 1, size + old.size
            if self._expired(old, since) or number > self._most or size > self._most_bytes:
                del self._jobs[known]

    def _expired(self, job: Job, since: float) -> bool:
        return job.ended and time.monotonic() - since > self._ttl + job.seconds

    def _own(self, identity: str, tenant: str) -> Job | None:
        """A probe of this process."""
        known = self._jobs.get((tenant, identity))
        return None if known is None or self._expired(known.job, known.since) else known.job

    def knows(self, identity: str, tenant: str) -> bool:
        """Whether this is a tenant's probe of this process that is not forgotten."""
        return self._own(identity, tenant) is not None

    async def close(self) -> None:
        """Write what is still to be written."""
        if self._mirrors:
            await asyncio.wait(self._mirrors, timeout=2 * _CALL)
        for task in self._mirrors:
            task.cancel()

    async def events(self, identity: str, tenant: str = "") -> list[Event]:
        """The last events of a probe about each thing until now, in order.

        Raises:
            ProbeNotFound: it is not known, or another tenant's.
            NotReady: it is not of this process, and Redis is away.
        """
        if (job := self._own(identity, tenant)) is not None:
            return list(job.events)
        try:
            found = await self._read(identity, tenant)
        except RedisUnavailable as error:
            raise _away() from error
        if found is None:
            raise ProbeNotFound(
                f"No probe of this id is known. Probes are forgotten {self._ttl} seconds after their end "
                "(IRONCLIP_PROBE_TTL_SECONDS)."
            )
        return found

    async def follow(self, identity: str, after: int = 0, tenant: str = "") -> AsyncIterator[Event]:
        """Events of a probe from number ``after`` on, to the last, as they come.

        Raises:
            ProbeNotFound, NotReady: as `events`, before the first event.
        """
        if (job := self._own(identity, tenant)) is not None:
            async for event in job.follow(after):
                yield event
            return
        known: list[Event] | None = await self.events(identity, tenant)
        seen = time.monotonic()
        while time.monotonic() - seen < _AWAY_SECONDS:
            if known is not None:
                seen = time.monotonic()
            for event in known or []:
                if event.number >= after:
                    yield event
                    after = event.number + 1
                if event.kind in ENDS:
                    return
            await asyncio.sleep(_POLL)
            known = None
            with contextlib.suppress(RedisUnavailable):
                known = await self._read(identity, tenant)

    async def cancel(self, identity: str, tenant: str = "") -> None:
        """End a probe, wherever it runs; one that has ended stays as it is.

        Raises:
            ProbeNotFound, NotReady: as `events`.
        """
        if (job := self._own(identity, tenant)) is not None:
            job.cancelled = True
            return
        await self.events(identity, tenant)
        key = f"{self._key(identity, tenant)}:cancel"

        async def wish(redis: Redis) -> object:
            return await redis.set(key, b"1", ex=self._ttl)

        assert self._link is not None
        try:
            await self._link.call(wish, timeout=_CALL)
        except RedisUnavailable as error:
            raise _away() from error

    async def page(self, tenant: str, limit: int, before: Cursor | None = None) -> Page:
        """A tenant's probes, newest first, from behind a cursor on; those of this process alone while Redis is away."""
        own = {
            identity: known
            for (whose, identity), known in self._jobs.items()
            if whose == tenant and not self._expired(known.job, known.since)
        }
        places = [Cursor(known.created, identity) for identity, known in own.items()]
        found: list[Listed] = []
        for at in sorted((at for at in places if before is None or at < before), reverse=True)[: limit + 1]:
            known = own[at.id]
            one = listed(at.id, brief(known.job, known.created, known.since))
            found += [one] if one is not None else []
        partial = False
        if self._link is not None:
            try:
                elsewhere = await self._elsewhere(self._link, tenant).newest(
                    limit + 1, before, lambda: problem(_lost())
                )
                found += [one for one in elsewhere if one.at.id not in own]
            except RedisUnavailable:
                partial = True
        found.sort(key=lambda one: one.at, reverse=True)
        return Page(found[:limit], len(found) > limit, partial)

    def _elsewhere(self, link: RedisLink, tenant: str) -> Elsewhere:
        def opened(place: str, blob: bytes) -> dict[str, Any] | None:
            event = self._event(place, blob)
            return event.data if event is not None and event.kind == BRIEF else None

        async def gone(places: Sequence[str]) -> set[str]:
            found = await asyncio.gather(*[self._gone(link, place) for place in places])
            return {place for place, is_gone in zip(places, found, strict=True) if is_gone}

        return Elsewhere(link, self._index(tenant), lambda identity: self._key(identity, tenant), opened, gone)

    def _key(self, identity: str, tenant: str) -> str:
        """Where a probe's events are in Redis; signatures are bound to it."""
        return f"{self._prefix}:tenant:{tenant}:probe:{identity}" if tenant else f"{self._prefix}:probe:{identity}"

    def _index(self, tenant: str) -> str:
        """Where the ids of a tenant's probes are in Redis."""
        return f"{self._prefix}:tenant:{tenant}:probes" if tenant else f"{self._prefix}:probes"

    async def _mirror(
        self, link: RedisLink, known: _Known, tenant: str, beside: Kept | None, known_of: asyncio.Event
    ) -> None:
        """Write a probe's events to Redis as they come, and look whether somebody wants it cancelled.

        `known_of` is set after the first try to write.
        """
        job = known.job
        key, after = self._key(job.id, tenant), 0

        async def write(redis: Redis) -> bool:
            pipe = redis.pipeline(transaction=False)
            pipe.hset(key, mapping={event.about: self._signed(key, event) for event in events})
            lives = self._ttl + round(job.seconds)
            pipe.expire(key, lives)
            enter(pipe, self._index(tenant), job.id, known.created, lives)
            if beside is not None and after == 0:
                pipe.set(beside.place, beside.entry, ex=max(lives, beside.seconds))
            pipe.set(f"{key}:alive", b"1", ex=_SIGN_SECONDS)
            pipe.delete(f"{key}:doubt")
            pipe.exists(f"{key}:cancel")
            return bool((await pipe.execute())[-1])

        ended, tries = False, 0
        events: list[Event] = []
        while True:
            # Before all others: the first says that there is such a probe, before it has begun.
            events = [Event(-1, BRIEF, brief(job, known.created, known.since)), *events]
            try:
                if await link.call(write, timeout=_CALL):
                    job.cancelled = True
                after = max(after, events[-1].number + 1)
            except RedisUnavailable:  # it goes on here; a Redis that comes back may have lost what was written
                after = 0
            known_of.set()
            tries += ended
            if ended and (after > job.events[-1].number or tries > _LAST_TRIES):
                return
            await asyncio.sleep(_POLL)
            ended, events = job.ended, [event for event in job.events if event.number >= after]

    async def _read(self, identity: str, tenant: str) -> list[Event] | None:
        """What Redis knows of a probe, in order, and its end where its replica is gone; None where it is not known.

        Raises:
            RedisUnavailable: Redis is away.
        """
        link = self._link
        if link is None or not identity.isalnum() or len(identity) > 64:
            return None

        key = self._key(identity, tenant)

        async def read(redis: Redis) -> tuple[dict[bytes, bytes], bool]:
            pipe = redis.pipeline(transaction=False)
            pipe.hgetall(key)
            pipe.exists(f"{key}:alive")
            rows, alive = await pipe.execute()
            return dict(rows), bool(alive)

        rows, alive = await link.call(read, timeout=_CALL)
        if not rows:
            return None
        every = [self._event(key, row) for row in rows.values()]
        found = sorted((one for one in every if one is not None and one.number >= 0), key=lambda one: one.number)
        if not alive and not any(one.kind in ENDS for one in found) and await self._gone(link, key):
            found.append(Event(found[-1].number + 1 if found else 0, "failed", {"error": problem(_lost())}))
        return found

    async def _gone(self, link: RedisLink, key: str) -> bool:
        """Whether the replica of a probe without a sign of life has given none since somebody first missed it."""

        async def doubt(redis: Redis) -> int:
            pipe = redis.pipeline(transaction=False)
            pipe.set(f"{key}:doubt", b"1", nx=True, px=1000 * _DOUBT_KEPT)
            pipe.pttl(f"{key}:doubt")
            left: int = (await pipe.execute())[-1]
            return left

        left = await link.call(doubt, timeout=_CALL)
        return 0 <= left <= 1000 * (_DOUBT_KEPT - _DOUBT_SECONDS)

    def _signed(self, key: str, event: Event) -> bytes:
        return self._seal.close(key, json.dumps(event).encode())

    def _event(self, key: str, row: bytes) -> Event | None:
        """An entry as it was written; None if it was not written by us."""
        with contextlib.suppress(NotSigned, ValueError, RecursionError, TypeError):
            number, kind, data = json.loads(self._seal.open(key, row))
            if type(number) is int and isinstance(kind, str) and isinstance(data, dict):
                return Event(number, kind, data)
        return None


def _away() -> NotReady:
    return NotReady(
        "Redis does not answer, and this replica does not run the probe itself: ask again in a moment.", retry_after=1
    )


def _lost() -> NotReady:
    return NotReady("The replica that ran this probe is gone, and the probe with it: ask for it again.", retry_after=1)

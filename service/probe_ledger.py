"""Where probes can be asked for: those of this process, and through Redis those of the other replicas.

A probe's events are its state. With a Redis they are written to a stream as they come, so that any replica can tell
them again; a wish to cancel goes the other way, as a key that the probe's own replica looks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis

from service.errors import ProbeNotFound
from service.probing import ENDS, Event, Job
from service.redis_link import RedisLink, RedisUnavailable

_POLL = 0.25  # between looks at Redis, seconds
_CALL = 1.0  # for one call to Redis, seconds; nobody's classification waits for it
_MOST_EVENTS = 5_000
_LAST_TRIES = 20  # to write how a probe ended


class Ledger:
    """The probes that can be asked for.

    Args:
        link: to Redis, if there is one.
        prefix: of every key.
        secret: signs events, so that another writer to Redis cannot plant any; may be empty.
        ttl: seconds that an ended probe is remembered.
        most: probes remembered in this process at most.
    """

    def __init__(self, link: RedisLink | None, prefix: str, secret: bytes, ttl: int, most: int = 1024) -> None:
        self._link, self._prefix, self._secret, self._ttl, self._most = link, f"{prefix}:probe:", secret, ttl, most
        self._jobs: OrderedDict[str, tuple[Job, float]] = OrderedDict()
        self._mirrors: set[asyncio.Task[None]] = set()

    def add(self, job: Job) -> None:
        """Remember a probe of this process, and let the other replicas know of it."""
        now = time.monotonic()
        for known, (old, since) in list(self._jobs.items()):
            if old.ended and (now - since > self._ttl or len(self._jobs) >= self._most):
                del self._jobs[known]
        self._jobs[job.id] = (job, now)
        if self._link is not None:
            task = asyncio.create_task(self._mirror(self._link, job))
            self._mirrors.add(task)
            task.add_done_callback(self._mirrors.discard)

    async def close(self) -> None:
        """Write what is still to be written."""
        if self._mirrors:
            await asyncio.wait(self._mirrors, timeout=2 * _CALL)
        for task in self._mirrors:
            task.cancel()

    async def events(self, identity: str) -> list[Event]:
        """All events of a probe until now.

        Raises:
            ProbeNotFound: it is not known.
        """
        if identity in self._jobs:
            return list(self._jobs[identity][0].events)
        found, _ = await self._read(identity, "-")
        if found is None:
            raise ProbeNotFound(
                f"No probe of this id is known. Probes are forgotten {self._ttl} seconds after their end "
                "(IRONCLIP_PROBE_TTL_SECONDS)."
            )
        return found

    async def follow(self, identity: str, after: int = 0) -> AsyncIterator[Event]:
        """Events of a probe from number ``after`` on, to the last, as they come.

        Raises:
            ProbeNotFound: it is not known.
        """
        if identity in self._jobs:
            async for event in self._jobs[identity][0].follow(after):
                yield event
            return
        known, position = await self._read(identity, "-")
        if known is None:
            await self.events(identity)  # says that it is not known
            return
        last = 0
        while True:
            for event in known:
                if last >= after:
                    yield event
                last += 1
                if event[0] in ENDS:
                    return
            await asyncio.sleep(_POLL)
            known, position = await self._read(identity, position)
            if known is None:
                return  # forgotten, or Redis is gone

    async def cancel(self, identity: str) -> None:
        """End a probe, wherever it runs; one that has ended stays as it is.

        Raises:
            ProbeNotFound: it is not known.
        """
        if identity in self._jobs:
            self._jobs[identity][0].cancelled = True
            return
        await self.events(identity)
        key = f"{self._prefix}{identity}:cancel"

        async def wish(redis: Redis) -> object:
            return await redis.set(key, b"1", ex=self._ttl)

        with contextlib.suppress(RedisUnavailable):
            assert self._link is not None
            await self._link.call(wish, timeout=_CALL)

    async def _mirror(self, link: RedisLink, job: Job) -> None:
        """Write a probe's events to Redis as they come, and look whether somebody wants it cancelled."""
        key, number = self._prefix + job.id, 0

        async def write(redis: Redis) -> bool:
            pipe = redis.pipeline(transaction=False)
            for kind, data in events:
                text = json.dumps(data).encode()
                fields = {"type": kind, "data": text, "mac": self._sign(job.id, kind, text)}
                pipe.xadd(key, fields, maxlen=_MOST_EVENTS)  # type: ignore[arg-type]
            pipe.expire(key, self._ttl + round(job.seconds))
            pipe.exists(f"{key}:cancel")
            return bool((await pipe.execute())[-1])

        # The first entry says that there is such a probe, before it has begun.
        ended, tries = False, 0
        events: list[Event] = [("queued", {})]
        while True:
            with contextlib.suppress(RedisUnavailable):  # it goes on here; the others will know less
                job.cancelled |= await link.call(write, timeout=_CALL)
                number += len([kind for kind, _ in events if kind != "queued"])
            tries += ended
            if ended and (number >= len(job.events) or tries > _LAST_TRIES):
                return
            await asyncio.sleep(_POLL)
            ended, events = job.ended, job.events[number:]

    async def _read(self, identity: str, after: str) -> tuple[list[Event] | None, str]:
        """Events after a position of the stream, and the new position; None where there is no such stream."""
        link = self._link
        if link is None or not identity.isalnum() or len(identity) > 64:
            return None, after

        async def read(redis: Redis) -> list[tuple[bytes, dict[bytes, bytes]]]:
            found: Any = await redis.xrange(self._prefix + identity, min=after if after == "-" else f"({after}")
            if not found and not await redis.exists(self._prefix + identity):
                raise RedisUnavailable("no such stream")
            return list(found)

        try:
            rows = await link.call(read, timeout=_CALL)
        except RedisUnavailable:
            return None, after
        events: list[Event] = []
        for position, row in rows:
            after = position.decode()
            kind, text = row.get(b"type", b"").decode(errors="replace"), row.get(b"data", b"")
            if kind == "queued":
                continue
            if self._secret and not hmac.compare_digest(row.get(b"mac", b""), self._sign(identity, kind, text)):
                continue  # not written by us
            with contextlib.suppress(ValueError, RecursionError):
                data = json.loads(text)
                if isinstance(data, dict):
                    events.append((kind, data))
        return events, after

    def _sign(self, identity: str, kind: str, text: bytes) -> bytes:
        signed = b"\0".join([identity.encode(), kind.encode(), text])
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest().encode()

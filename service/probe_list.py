"""A tenant's probes in brief, newest first, and the index in Redis by which the other replicas' are found.

The index has ids alone, by when the probes were asked for, and of the newest alone. What an id leads to is signed for
its place, so an id that another writer plants leads to nothing, and one that is moved is left out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from service.probe_job import ENDS, Job
from service.redis_link import RedisLink

# What a probe is listed as, beside its events; of a kind that no event has.
BRIEF = "brief"
# A Cursor as it is written.
CURSOR_PATTERN = r"^[0-9]{1,15}-[A-Za-z0-9]{1,64}$"
# Ids in a tenant's index at most; the oldest make way.
_MOST = 1000
# An index outlives the last probe in it, since one before it may be kept for longer.
_LONGER = 90_000
_LEAST_READ = 50  # ids in one look
_LONGEST = 64  # characters of an id
_CALL = 1.0  # for one call to Redis, seconds
_STATES = ("queued", "running", *ENDS)
_FIELDS = ("encoder", "defence", "label", "unit", "robust_to", "broken_at", "error")


class Cursor(NamedTuple):
    """Where a page ends: when its last probe was asked for, in milliseconds since 1970, and that probe's id."""

    created: int
    id: str

    @classmethod
    def read(cls, text: str) -> Cursor:
        """The cursor that `str` wrote."""
        created, _, identity = text.partition("-")
        return cls(int(created), identity)

    def __str__(self) -> str:
        return f"{self.created}-{self.id}"


class Listed(NamedTuple):
    """One probe of a list: where it stands in it, and what is told of it."""

    at: Cursor
    row: dict[str, Any]


class Page(NamedTuple):
    """Some of a tenant's probes, newest first; whether there are more behind them, and whether some cannot be seen."""

    probes: list[Listed]
    more: bool
    partial: bool


def brief(job: Job, created: int, since: float) -> dict[str, Any]:
    """What a list tells of a probe, without its pictures; times in milliseconds since 1970.

    Args:
        job: of this process.
        created: when it was asked for.
        since: the same moment by the monotonic clock.
    """
    told = {event.kind: event.data for event in job.events}
    known, begun = told.get("done") or told.get("progress") or {}, told.get("started", {})
    return {
        "status": job.status,
        "created": created,
        "started": created + max(0, round(1000 * (job.started - since))) if job.started else None,
        "encoder": job.about.get("encoder"),
        "defence": job.about.get("defence"),
        "label": begun.get("label"),
        "unit": begun.get("unit"),
        "robust_to": known.get("robust_to"),
        "broken_at": known.get("broken_at"),
        "error": told.get("failed", {}).get("error"),
    }


def listed(identity: str, data: dict[str, Any]) -> Listed | None:
    """A probe as a list has it, of what `brief` said; None for what `brief` could not have said."""
    status, created, started = data.get("status"), data.get("created"), data.get("started")
    if status not in _STATES or type(created) is not int or not (started is None or type(started) is int):
        return None
    try:
        times = {"created": _iso(created), "started": _iso(started) if started is not None else None}
    except (ValueError, OverflowError, OSError):
        return None
    row = {"id": identity, "status": status, **times, **{name: data.get(name) for name in _FIELDS}}
    return Listed(Cursor(created, identity), row)


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="milliseconds")


def enter(pipe: Pipeline, index: str, identity: str, created: int, lives: int) -> None:
    """Put a probe, which is known for so many seconds, into its tenant's index; also one that is in it already."""
    pipe.zadd(index, {identity: created})
    pipe.zremrangebyrank(index, 0, -_MOST - 1)
    pipe.expire(index, lives + _LONGER)


class Elsewhere:
    """The probes of one tenant that Redis knows of, whichever replica runs them.

    Args:
        link: to Redis.
        index: key of the tenant's index.
        place: where the probe of an id is.
        opened: what stands in a place, if it was written by us for that place.
        gone: which of the places have lost their replica.
    """

    def __init__(
        self,
        link: RedisLink,
        index: str,
        place: Callable[[str], str],
        opened: Callable[[str, bytes], dict[str, Any] | None],
        gone: Callable[[Sequence[str]], Awaitable[set[str]]],
    ) -> None:
        self._link, self._index, self._place, self._opened, self._gone = link, index, place, opened, gone

    async def newest(self, most: int, before: Cursor | None, lost: Callable[[], dict[str, Any]]) -> list[Listed]:
        """At least so many probes, where there are as many, from behind a cursor on.

        Args:
            most: that are wanted.
            before: the cursor; None: from the newest on.
            lost: the problem of a probe whose replica is gone.

        Raises:
            RedisUnavailable: Redis is away.
        """
        top: float | None = before.created if before is not None else None
        probes: dict[str, Listed] = {}
        silent: set[str] = set()
        seen: set[bytes] = set()
        empty: list[bytes] = []
        while len(probes) < most:
            found = [one for one in await self._look(top, most) if one[0] not in seen]
            for name, score, blob, alive in found:
                seen.add(name)
                top = score
                if blob is None:
                    empty.append(name)
                    continue
                identity = name.decode(errors="replace")
                told = self._opened(self._place(identity), blob)
                one = listed(identity, told) if told is not None else None
                if one is None or one.at.created != score or (before is not None and one.at >= before):
                    continue
                probes[identity] = one
                if not alive and one.row["status"] not in ENDS:
                    silent.add(identity)
            if not found:
                break
        await self._forget(empty)
        gone = await self._gone([self._place(one) for one in silent]) if silent else set()
        for identity in silent:
            if self._place(identity) in gone:
                probes[identity].row.update(status="failed", error=lost())
        return list(probes.values())

    async def _forget(self, ids: list[bytes]) -> None:
        """Take out of the index what leads nowhere any more."""

        async def remove(redis: Redis) -> object:
            return await redis.zrem(self._index, *ids)

        if ids:
            await self._link.call(remove, timeout=_CALL)

    async def _look(self, top: float | None, most: int) -> list[tuple[bytes, float, bytes | None, bool]]:
        """Ids up to a score, from there down: each with its score, its brief, and whether its replica lives."""

        async def read(redis: Redis) -> list[tuple[bytes, float, bytes | None, bool]]:
            highest, number = "+inf" if top is None else top, max(most, _LEAST_READ)
            ids: Any = await redis.zrevrangebyscore(self._index, highest, "-inf", start=0, num=number, withscores=True)
            pipe = redis.pipeline(transaction=False)
            for name, _ in ids:
                # What is no id leads to where nothing is.
                place = self._place(name.decode() if name.isalnum() and len(name) <= _LONGEST else "-")
                pipe.hget(place, BRIEF)
                pipe.exists(f"{place}:alive")
            # A key that holds something else answers with an error of its own, and is no probe.
            told = await pipe.execute(raise_on_error=False) if ids else []
            blobs = [blob if isinstance(blob, bytes) else None for blob in told[::2]]
            lives = [alive == 1 for alive in told[1::2]]
            return [(*one, blob, alive) for one, blob, alive in zip(ids, blobs, lives, strict=True)]

        return await self._link.call(read, timeout=_CALL)

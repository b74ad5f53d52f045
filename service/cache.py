"""The caches: arrays by content, in this process first and in Redis behind it when there is one.

A key is a SHA-256 over everything that can change the answer, so a value is never stale, only unused; it is
dropped by age and by size. What Redis holds is checked before it is believed, and Redis is never waited for long.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cachetools import TTLCache
from redis.asyncio import Redis

from service import telemetry
from service.redis_link import RedisLink, RedisUnavailable
from service.vectors import Arrays, Schema, ValueRejected, pack, unpack

# Part of every key: raise it whenever the meaning of a stored value changes.
SCHEMA_VERSION = 2
_OVERHEAD = 200  # bytes of Python objects around one value, roughly
_MAX_SHARED_BYTES = 32 * 1024 * 1024  # of one value in Redis, and of all that wait to be written
_MAX_UNWRITTEN = 4096  # values that wait to be written; more are left out
_BATCH, _BATCH_BYTES = 256, 4 * 1024 * 1024  # of one call that writes
# So many bytes at once are signed, or checked, in a thread: it is a millisecond for some megabytes, and a text bank
# has tens of them.
_THREAD_BYTES = 256 * 1024
_WRITE_SECONDS = 1.0  # nobody waits for a write, so it may take longer than a look-up


@dataclass(frozen=True)
class KeyScope:
    """All that decides a value except the image: one scope serves a whole request.

    Attributes:
        encoder: digest of the encoder.
        dtype: what the towers compute in.
        preprocessing: digest of the way from picture to pixels.
        operation: `image`, `embed-image`, `classify`, `text-bank`, ...
        label_set: digest of the resolved label set, "" where there is none.
        tree: digest of the label tree, "" where there is none.
        levels: `rollup`, `prompts` or "".
        defence: the defence with all its options and its seed.
        tenant: whose cache it is; empty where there are no API keys.
    """

    encoder: str
    dtype: str
    preprocessing: str
    operation: str
    label_set: str = ""
    tree: str = ""
    levels: str = ""
    defence: Mapping[str, Any] = field(default_factory=dict)
    tenant: str = ""

    def digest(self) -> bytes:
        """SHA-256 over the schema version and every field."""
        form = {"schema": SCHEMA_VERSION, **self.__dict__, "defence": dict(self.defence)}
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).digest()


def image_key(scope: bytes, image_digest: bytes) -> bytes:
    """The key of one image under one scope's digest."""
    return hashlib.sha256(scope + image_digest).digest()


class ArrayCache:
    """Arrays by key, in two tiers.

    Args:
        name: the metric's label: one of a closed set.
        max_bytes: size of the tier in this process; 0 turns both tiers off.
        ttl: seconds that a value lives.
        link: Redis, or None.
        prefix: front part of the keys in Redis.
        secret: signs the values in Redis.
        shared_timeout: seconds for one look-up in Redis, if not the link's own (for large values).
    """

    def __init__(
        self,
        name: str,
        *,
        max_bytes: int,
        ttl: float,
        link: RedisLink | None = None,
        prefix: str = "ironclip",
        secret: bytes = b"",
        shared_timeout: float | None = None,
    ) -> None:
        self.name = name
        self.enabled = max_bytes > 0
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._link = link
        self._prefix = f"{prefix}:cache:{name}:".encode()
        self._secret = hashlib.sha256(secret).digest() if secret else b""
        self._timeout = shared_timeout
        self._local: TTLCache[bytes, Arrays] = TTLCache(max(max_bytes, 1), ttl, getsizeof=_size)
        self._unwritten: deque[tuple[bytes, Arrays]] = deque()
        self._unwritten_bytes = 0
        self._writer: asyncio.Task[None] | None = None

    async def get_many(self, keys: Sequence[bytes], schema: Schema) -> list[Arrays | None]:
        """Look the keys up, in this process and then, in one call, in Redis; None for what is not there."""
        if not self.enabled:
            return [None] * len(keys)
        found: list[Arrays | None] = [self._local.get(key) for key in keys]
        missing = [i for i, value in enumerate(found) if value is None]
        self._count("hit", len(keys) - len(missing))
        if missing and self._link is not None:
            blobs = await self._fetch([keys[i] for i in missing])
            shared = {i: (keys[i], blob) for i, blob in zip(missing, blobs, strict=True) if blob is not None}
            read = partial(self._read_all, list(shared.values()), schema)
            large = sum(len(blob) for _, blob in shared.values()) > _THREAD_BYTES
            for i, arrays in zip(shared, await asyncio.to_thread(read) if large else read(), strict=True):
                found[i] = self._accept(keys[i], arrays)
        self._count("miss", sum(value is None for value in found))
        return found

    async def get(self, key: bytes, schema: Schema) -> Arrays | None:
        """Look one key up."""
        return (await self.get_many([key], schema))[0]

    def put(self, key: bytes, arrays: Arrays) -> None:
        """Keep a value; Redis gets it in the background, or not at all if it is busy or down."""
        if not self.enabled:
            return
        self._keep(key, arrays)
        link = self._link
        if link is None or not link.available:
            return
        if len(self._unwritten) >= _MAX_UNWRITTEN or self._unwritten_bytes + _size(arrays) > _MAX_SHARED_BYTES:
            self._count("unwritten")
            return
        self._unwritten.append((key, arrays))
        self._unwritten_bytes += _size(arrays)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(link))

    async def flush(self) -> None:
        """Wait for the writes under way."""
        while self._writer is not None and not self._writer.done():
            await self._writer

    def _keep(self, key: bytes, arrays: Arrays) -> None:
        if _size(arrays) <= self._max_bytes:
            self._local[key] = arrays
            telemetry.CACHE_BYTES.labels(self.name).set(self._local.currsize)

    def _place(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    async def _fetch(self, keys: list[bytes]) -> Sequence[bytes | None]:
        names = [self._place(key) for key in keys]

        async def mget(redis: Redis) -> Sequence[bytes | None]:
            values = await redis.mget(names)
            return [value if isinstance(value, bytes) else None for value in values]

        assert self._link is not None
        try:
            return await self._link.call(mget, timeout=self._timeout)
        except RedisUnavailable:
            self._count("unavailable", len(keys))
            return [None] * len(keys)

    def _read_all(self, shared: Sequence[tuple[bytes, bytes]], schema: Schema) -> list[Arrays | None]:
        """What Redis had, by key; None for what is not believed."""
        found: list[Arrays | None] = []
        for key, blob in shared:
            try:
                found.append(unpack(blob, schema, key=key, secret=self._secret))
            except ValueRejected:
                found.append(None)
        return found

    def _accept(self, key: bytes, arrays: Arrays | None) -> Arrays | None:
        if arrays is None:
            self._count("rejected")
            return None
        self._count("shared-hit")
        self._keep(key, arrays)
        return arrays

    def _pack_all(self, batch: Sequence[tuple[bytes, Arrays]]) -> list[tuple[bytes, bytes]]:
        """What Redis is to keep, with where it is kept."""
        return [(self._place(key), pack(arrays, key=key, secret=self._secret)) for key, arrays in batch]

    async def _write(self, link: RedisLink) -> None:
        """Write what waits, many values in one call: a call for each would need a connection for each."""
        while self._unwritten:
            batch: list[tuple[bytes, Arrays]] = []
            size = 0
            while self._unwritten and len(batch) < _BATCH and size < _BATCH_BYTES:
                batch.append(self._unwritten.popleft())
                size += _size(batch[-1][1])
            large = size > _THREAD_BYTES
            packed = await asyncio.to_thread(self._pack_all, batch) if large else self._pack_all(batch)
            self._unwritten_bytes -= size
            try:
                await link.call(partial(self._set, packed), timeout=max(_WRITE_SECONDS, self._timeout or 0))
            except RedisUnavailable:
                self._count("unavailable", len(batch))

    async def _set(self, batch: list[tuple[bytes, bytes]], redis: Redis) -> None:
        async with redis.pipeline(transaction=False) as pipe:
            for name, blob in batch:
                pipe.set(name, blob, px=max(1, int(1000 * self._ttl)))
            await pipe.execute()

    def _count(self, result: str, times: int = 1) -> None:
        telemetry.count_cache(self.name, result, times)


def _size(arrays: Arrays) -> int:
    return _OVERHEAD + sum(array.nbytes + _OVERHEAD for array in arrays.values())

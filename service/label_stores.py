"""Where registered label sets are kept: files in a folder, or Redis. Replicas over one store see the same sets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock, Timeout
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ironclip.errors import Conflict
from service.errors import TooManyLabelSets
from service.redis_link import RedisLink, RedisRefused, RedisUnavailable
from service.seal import NotSigned, Seal
from service.settings import MIB, NAME_PATTERN

T = TypeVar("T")

# Versions of a name that are kept beside the newest: as many, and as long as there is room.
KEPT_VERSIONS = 15
MAX_SETS = 1000
MAX_BYTES = 64 * MIB
_LOCK_SECONDS = 5.0
# A label set is read rarely and can be megabytes: it may take longer than a cached vector.
_REDIS_SECONDS = 2.0


class StoreDown(Exception):
    """The store cannot be read or written now; the text says why."""


class UnsignedSet(StoreDown):
    """What is stored was not signed by this service, or not for where it stands."""


@dataclass(frozen=True)
class Expect:
    """The preconditions of RFC 9110 section 13: digests from If-Match and If-None-Match, `*` for any."""

    if_match: tuple[str, ...] = ()
    if_none_match: tuple[str, ...] = ()

    def check(self, current: str | None) -> None:
        """Raise Conflict unless the current version (None: there is none) is an expected one."""
        if self.if_match and (current is None or ("*" not in self.if_match and current not in self.if_match)):
            raise Conflict("The label set has changed since (If-Match): get it again and decide anew.")
        if self.if_none_match and current is not None and ("*" in self.if_none_match or current in self.if_none_match):
            raise Conflict("There is such a label set already (If-None-Match).")


class Store(Protocol):
    """Named documents in versions, of one tenant; every method may raise StoreDown."""

    def of(self, tenant: str) -> Store:
        """The documents of another tenant; those of "" are this store's own."""

    async def head(self, name: str) -> str | None:
        """Digest of the newest version."""

    async def heads(self) -> dict[str, str]:
        """Every name with the digest of its newest version."""

    async def load(self, name: str, digest: str) -> bytes | None:
        """One version's document."""

    async def put(self, name: str, digest: str, document: bytes, expect: Expect) -> bool:
        """Make a version the newest; returns whether the name is new. Raises Conflict, TooManyLabelSets."""

    async def delete(self, name: str, expect: Expect) -> bool:
        """Remove all versions; returns whether there were any. Raises Conflict."""


class FileStore:
    """A folder for each name: a file for each version, and `current`, which names the newest.

    Files are replaced by renaming, so a reader in another process sees the old version or the new one; writers
    take a lock.
    """

    def __init__(self, folder: Path, max_sets: int = MAX_SETS, max_bytes: int = MAX_BYTES) -> None:
        self.root = folder
        self.folder = folder / "label-sets"
        self.max_sets = max_sets
        self.max_bytes = max_bytes

    def of(self, tenant: str) -> FileStore:
        """The documents of one tenant: a folder beside the others."""
        return FileStore(self.root / "tenants" / tenant, self.max_sets, self.max_bytes) if tenant else self

    async def head(self, name: str) -> str | None:
        """Digest of the newest version."""
        return await asyncio.to_thread(self._guarded, self._head, name)

    async def heads(self) -> dict[str, str]:
        """Every name with the digest of its newest version."""
        return await asyncio.to_thread(self._guarded, self._heads)

    async def load(self, name: str, digest: str) -> bytes | None:
        """One version's document."""
        return await asyncio.to_thread(self._guarded, self._load, name, digest)

    async def put(self, name: str, digest: str, document: bytes, expect: Expect) -> bool:
        """Make a version the newest; returns whether the name is new."""
        return await asyncio.to_thread(self._guarded, self._put, name, digest, document, expect)

    async def delete(self, name: str, expect: Expect) -> bool:
        """Remove all versions; returns whether there were any."""
        return await asyncio.to_thread(self._guarded, self._delete, name, expect)

    def _guarded(self, action: Callable[..., T], *args: object) -> T:
        try:
            return action(*args)
        except (OSError, Timeout) as error:
            raise StoreDown(f"the folder of IRONCLIP_STATE_DIR cannot be used ({type(error).__name__}).") from error

    def _head(self, name: str) -> str | None:
        try:
            return (self.folder / name / "current").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None

    def _heads(self) -> dict[str, str]:
        if not self.folder.is_dir():
            return {}
        names = (path.name for path in self.folder.iterdir() if re.fullmatch(NAME_PATTERN, path.name))
        heads = {name: self._head(name) for name in names}
        return {name: digest for name, digest in heads.items() if digest is not None}

    def _load(self, name: str, digest: str) -> bytes | None:
        if self._head(name) is None:
            return None
        try:
            return (self.folder / name / f"{digest}.json").read_bytes()
        except FileNotFoundError:
            return None

    def _put(self, name: str, digest: str, document: bytes, expect: Expect) -> bool:
        with self._lock():
            current = self._head(name)
            expect.check(current)
            if current is None:
                _check_room(len(self._heads()), self.max_sets)
            folder = self.folder / name
            there = {path: path.stat() for path in self.folder.glob("*/*.json")}
            others = sum(about.st_size for path, about in there.items() if path.parent != folder)
            older = [path for path in there if path.parent == folder and path.stem != digest]
            older.sort(key=lambda path: there[path].st_mtime_ns, reverse=True)
            kept = _kept(len(document), [there[path].st_size for path in older], others, self.max_bytes)
            folder.mkdir(exist_ok=True)
            _replace(folder / f"{digest}.json", document)
            _replace(folder / "current", digest.encode())
            for path in older[kept:]:
                path.unlink(missing_ok=True)
            return current is None

    def _delete(self, name: str, expect: Expect) -> bool:
        with self._lock():
            current = self._head(name)
            expect.check(current)
            if current is None:
                return False
            (self.folder / name / "current").unlink()
            shutil.rmtree(self.folder / name, ignore_errors=True)
            return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS):
            yield


def _kept(document: int, older: Sequence[int], others: int, most: int) -> int:
    """How many older versions of a name there is room for, the newest of them first.

    Args:
        document: bytes of the version that comes.
        older: bytes of those that are there.
        others: bytes of all other names' versions.
        most: bytes of all.

    Raises:
        TooManyLabelSets: there is not even room for the one that comes.
    """
    if others + document > most:
        raise TooManyLabelSets(
            f"All label sets with their older versions would take {others + document} bytes, at most {most} are kept "
            "(IRONCLIP_MAX_LABEL_SET_BYTES): delete one, or make this one shorter.",
            limit=most,
        )
    held, kept = others + document, 0
    for size in older[:KEPT_VERSIONS]:
        held += size
        if held > most // 2:  # so that they shut no other set out
            break
        kept += 1
    return kept


def _check_room(count: int, most: int) -> None:
    if count >= most:
        raise TooManyLabelSets(
            f"{count} label sets are registered, and at most {most} are kept (IRONCLIP_MAX_LABEL_SETS).", limit=most
        )


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class RedisStore:
    """A hash for each name: `current`, `versions` (a JSON list, newest first), and a field for each version.

    `current` and the versions are signed for their tenant and name. Another writer can still delete them, or put back
    what stood there before; neither makes a set that nobody registered here.
    """

    def __init__(
        self,
        link: RedisLink,
        prefix: str,
        max_sets: int = MAX_SETS,
        seal: Seal | None = None,
        tenant: str = "",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.link = link
        self.max_sets = max_sets
        self.max_bytes = max_bytes
        self.seal = seal or Seal()
        self.tenant = tenant
        self.root = prefix
        own = f"{prefix}:tenant:{tenant}" if tenant else prefix
        self.names_key = f"{own}:label-sets"
        self.bytes_key = f"{own}:label-set-bytes"
        self.prefix = f"{own}:label-set:"

    def of(self, tenant: str) -> RedisStore:
        """The documents of one tenant: under keys of its own."""
        return RedisStore(self.link, self.root, self.max_sets, self.seal, tenant, self.max_bytes) if tenant else self

    async def head(self, name: str) -> str | None:
        """Digest of the newest version."""

        async def hget(redis: Redis) -> object:
            return await redis.hget(self.prefix + name, "current")

        return self._digest(name, await self._call(hget, None))

    async def heads(self) -> dict[str, str]:
        """Every name with the digest of its newest version; those that are not signed are left out."""

        async def read(redis: Redis) -> dict[str, object]:
            names = sorted(filter(None, map(_text, await redis.smembers(self.names_key))))
            pipe = redis.pipeline(transaction=False)
            for name in names:
                pipe.hget(self.prefix + name, "current")
            # A key that holds something else answers with an error of its own, and is not a label set.
            return dict(zip(names, await pipe.execute(raise_on_error=False), strict=True))

        found: dict[str, str] = {}
        for name, value in (await self._call(read, _REDIS_SECONDS)).items():
            with suppress(UnsignedSet):
                digest = self._digest(name, value)
                found |= {name: digest} if digest else {}
        return found

    async def load(self, name: str, digest: str) -> bytes | None:
        """One version's document."""

        async def hget(redis: Redis) -> bytes | None:
            value = await redis.hget(self.prefix + name, digest)
            return value if isinstance(value, bytes) else None

        blob = await self._call(hget, _REDIS_SECONDS)
        return self._opened(self._place(name, digest), blob) if blob is not None else None

    async def put(self, name: str, digest: str, document: bytes, expect: Expect) -> bool:
        """Make a version the newest; returns whether the name is new."""

        async def write(pipe: Pipeline, current: str | None) -> bool:
            if current is None:
                # Two that create the last free names at once must not both succeed.
                await pipe.watch(self.names_key)
                _check_room(await pipe.scard(self.names_key), self.max_sets)
            kept = _versions(await pipe.hget(self.prefix + name, "versions"))
            older = [old for old in kept if old != digest]
            await pipe.watch(self.bytes_key)
            # What another writer put there counts for nothing.
            held = {
                _text(key): int(value) for key, value in (await pipe.hgetall(self.bytes_key)).items() if value.isdigit()
            }
            sizes = [int(await pipe.hstrlen(self.prefix + name, old)) for old in older]
            others = sum(size for other, size in held.items() if other != name)
            count = _kept(len(document), sizes, others, self.max_bytes)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(self.bytes_key, name, len(document) + sum(sizes[:count]))
            pipe.hset(
                self.prefix + name,
                mapping={
                    digest: self.seal.close(self._place(name, digest), document),
                    "current": self.seal.close(self._place(name), digest.encode()),
                    "versions": json.dumps([digest, *older[:count]]),
                },
            )
            for old in older[count:]:
                pipe.hdel(self.prefix + name, old)
            pipe.sadd(self.names_key, name)
            await pipe.execute()
            return current is None

        return await self._transaction(name, expect, write)

    async def delete(self, name: str, expect: Expect) -> bool:
        """Remove all versions; returns whether there were any."""

        async def write(pipe: Pipeline, current: str | None) -> bool:
            # Also one that is not signed: it can be neither read nor kept.
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(self.prefix + name)
            pipe.srem(self.names_key, name)
            pipe.hdel(self.bytes_key, name)
            return bool((await pipe.execute())[0])

        return await self._transaction(name, expect, write)

    async def _transaction(
        self, name: str, expect: Expect, write: Callable[[Pipeline, str | None], Awaitable[bool]]
    ) -> bool:
        """Check and write as one step: if the name changes in between, check again."""

        async def attempt(redis: Redis) -> bool:
            async with redis.pipeline(transaction=True) as pipe:
                while True:
                    try:
                        await pipe.watch(self.prefix + name)
                        current = self._believed(name, await pipe.hget(self.prefix + name, "current"))
                        expect.check(current)
                        return await write(pipe, current)
                    except WatchError:
                        continue

        return await self._call(attempt, _REDIS_SECONDS)

    def _place(self, name: str, version: str = "current") -> str:
        """What a signature is bound to; no part can hold a slash."""
        return f"{self.tenant}/{name}/{version}"

    def _opened(self, place: str, blob: bytes) -> bytes:
        """What is stored for a place; raises UnsignedSet."""
        try:
            return self.seal.open(place, blob)
        except NotSigned:
            text = "it is not signed with this service's IRONCLIP_REDIS_MAC_KEY; put the label set again."
            raise UnsignedSet(text) from None

    def _digest(self, name: str, value: object) -> str | None:
        """The digest that stands in `current`; raises UnsignedSet."""
        if not isinstance(value, bytes):
            return None
        return _text(self._opened(self._place(name), value))

    def _believed(self, name: str, value: object) -> str | None:
        """The same for whoever writes: what is not signed is overwritten as if it were not there."""
        try:
            return self._digest(name, value)
        except UnsignedSet:
            return None

    async def _call(self, action: Callable[[Redis], Awaitable[T]], timeout: float | None) -> T:
        try:
            return await self.link.call(action, timeout=timeout)
        except RedisRefused as error:
            reason = "keeps something else under this key; delete it there" if error.wrong_type else "refuses"
            raise StoreDown(f"Redis {reason} ({error}).") from error
        except RedisUnavailable as error:
            raise StoreDown(f"Redis does not answer ({error}).") from error


def _text(value: object) -> str | None:
    """Redis' value as text; what is not UTF-8 was not written here, and is nothing."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else None


def _versions(value: object) -> list[str]:
    """The stored list of versions; others can write to Redis, so what is not such a list counts as empty."""
    try:
        versions = json.loads(_text(value) or "[]")
    except (ValueError, RecursionError):
        return []
    return [one for one in versions if isinstance(one, str)] if isinstance(versions, list) else []

"""The caches over a real Redis: shared, checked, and never in the way when Redis is down or slow."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import redis as sync_redis
from hypothesis import given
from hypothesis import strategies as st

from service import cache as cache_module
from service import telemetry
from service.cache import ArrayCache, KeyScope, image_key
from service.redis_link import RedisLink, RedisRefused
from tests.service.conftest import RedisServer

pytestmark = pytest.mark.anyio

SCHEMA = {"x": ("float32", (None,))}


def vector(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)}


def scope(**changes: object) -> KeyScope:
    base = KeyScope("encoder", "float32", "pre", "classify", "labels", "tree", "rollup", {"name": "none"})
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KeyScope)])
async def test_whatever_can_change_an_answer_changes_its_key(field: str) -> None:
    other = {"name": "cola", "seed": 1} if field == "defence" else "other"
    assert scope(**{field: other}).digest() != scope().digest()


async def test_a_defence_seed_changes_the_key() -> None:
    first, second = ({"name": "cola", "seed": seed} for seed in (1, 2))
    assert scope(defence=first).digest() != scope(defence=second).digest()


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_other_pixels_have_another_key(one: bytes, two: bytes) -> None:
    digest = scope().digest()
    assert (image_key(digest, one) == image_key(digest, two)) == (one == two)


async def test_the_local_tier_keeps_to_its_bytes() -> None:
    cache = ArrayCache("test", max_bytes=20_000, ttl=60)
    for i in range(100):
        cache.put(bytes([i]) * 32, vector(*range(250)))
    kept = [i for i in range(100) if await cache.get(bytes([i]) * 32, SCHEMA) is not None]
    assert 5 < len(kept) <= 20
    assert max(kept) == 99


async def test_values_age() -> None:
    cache = ArrayCache("test", max_bytes=20_000, ttl=0.05)
    cache.put(b"k" * 32, vector(1))
    assert await cache.get(b"k" * 32, SCHEMA) is not None
    await asyncio.sleep(0.1)
    assert await cache.get(b"k" * 32, SCHEMA) is None


async def test_size_zero_turns_it_off() -> None:
    cache = ArrayCache("test", max_bytes=0, ttl=60)
    cache.put(b"k" * 32, vector(1))
    assert await cache.get(b"k" * 32, SCHEMA) is None


@pytest.fixture
async def replicas(redis_server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[ArrayCache]]]:
    """Make caches as separate replicas have them: nothing in common but Redis."""
    links: list[RedisLink] = []

    async def replica(secret: bytes = b"", timeout: float = 0.05) -> ArrayCache:
        link = RedisLink(redis_server.url, timeout)
        await link.start()
        links.append(link)
        return ArrayCache("test", max_bytes=1 << 20, ttl=60, link=link, secret=secret)

    yield replica
    for link in links:
        await link.close()


def counted(result: str) -> float:
    return telemetry.CACHE.labels("test", result)._value.get()


async def test_a_value_written_by_one_replica_is_read_by_another(
    replicas: Callable[..., Awaitable[ArrayCache]],
) -> None:
    one, two = await replicas(), await replicas()
    one.put(b"k" * 32, vector(1, 2))
    await one.flush()
    found = await two.get_many([b"k" * 32, b"z" * 32], SCHEMA)
    assert found[0] is not None
    assert found[0]["x"].tolist() == [1, 2]
    assert found[1] is None


@pytest.mark.parametrize("poison", [b"", b"garbage", b"\x80\x04.", b"ICV1" + b"\x00" * 40])
async def test_a_poisoned_value_is_refused_and_counted(
    replicas: Callable[..., Awaitable[ArrayCache]], redis_server: RedisServer, poison: bytes
) -> None:
    one, two = await replicas(), await replicas()
    one.put(b"k" * 32, vector(1, 2))
    await one.flush()
    client = sync_redis.Redis.from_url(redis_server.url)
    (key,) = client.keys("ironclip:cache:*")
    client.set(key, poison)
    before = counted("rejected")
    assert await two.get(b"k" * 32, SCHEMA) is None
    assert counted("rejected") == before + 1
    two.put(b"k" * 32, vector(1, 2))
    await two.flush()
    assert await (await replicas()).get(b"k" * 32, SCHEMA) is not None


@pytest.mark.parametrize(
    ("size", "values", "aside"), [(8, 1, False), (8, 50, False), (90_000, 1, True), (9_000, 9, True)]
)
async def test_many_bytes_are_signed_and_checked_beside_the_event_loop(
    replicas: Callable[..., Awaitable[ArrayCache]], monkeypatch: pytest.MonkeyPatch, size: int, values: int, aside: bool
) -> None:
    """A text bank takes tens of milliseconds, in which nobody else would be answered."""
    one, two = await replicas(timeout=2.0), await replicas(timeout=2.0)
    seen: dict[str, set[int]] = {"pack": set(), "unpack": set()}
    for name, threads in seen.items():
        plain = getattr(cache_module, name)

        def watched(*args: Any, plain: Any = plain, threads: set[int] = threads, **options: Any) -> Any:
            threads.add(threading.get_ident())
            return plain(*args, **options)

        monkeypatch.setattr(cache_module, name, watched)
    keys = [bytes([number]) * 32 for number in range(values)]
    for number, key in enumerate(keys):
        one.put(key, {"x": np.full(size, number, np.float32)})
    await one.flush()
    found = await two.get_many(keys, SCHEMA)
    assert [value is not None and float(value["x"][-1]) for value in found] == list(range(values))
    for threads in seen.values():
        assert (threading.get_ident() not in threads) == aside


async def test_a_good_value_under_another_key_is_refused(
    replicas: Callable[..., Awaitable[ArrayCache]], redis_server: RedisServer
) -> None:
    one = await replicas()
    one.put(b"a" * 32, vector(1))
    one.put(b"b" * 32, vector(2))
    await one.flush()
    client = sync_redis.Redis.from_url(redis_server.url)
    first, second = (b"ironclip:cache:test:" + (letter * 32).hex().encode() for letter in (b"a", b"b"))
    client.set(first, client.get(second))
    assert await (await replicas()).get(b"a" * 32, SCHEMA) is None


async def test_a_writer_without_the_secret_cannot_plant_scores(
    replicas: Callable[..., Awaitable[ArrayCache]],
) -> None:
    attacker = await replicas(b"")
    attacker.put(b"k" * 32, vector(9))
    await attacker.flush()
    assert await (await replicas(b"our secret")).get(b"k" * 32, SCHEMA) is None


async def test_redis_down_at_the_start_and_up_later() -> None:
    server = RedisServer()
    link = RedisLink(server.url, 0.05)
    await link.start()
    cache = ArrayCache("test", max_bytes=1 << 20, ttl=60, link=link)
    try:
        start = time.perf_counter()
        for i in range(50):
            assert await cache.get(bytes([i]) * 32, SCHEMA) is None
        assert time.perf_counter() - start < 1.5  # of 2.5 s, were each to wait
        assert telemetry.REDIS_UP._value.get() == 0
        server.start()
        deadline = time.monotonic() + 10
        while not link.available and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert telemetry.REDIS_UP._value.get() == 1
        cache.put(b"k" * 32, vector(1))
        await cache.flush()
        assert sync_redis.Redis.from_url(server.url).dbsize() == 1
    finally:
        await link.close()
        server.kill()


@pytest.mark.parametrize("trouble", ["killed", "paused"])
async def test_redis_lost_on_the_way_costs_a_few_short_waits_and_then_nothing(
    replicas: Callable[..., Awaitable[ArrayCache]], redis_server: RedisServer, trouble: str
) -> None:
    cache = await replicas()
    cache.put(b"k" * 32, vector(1))
    await cache.flush()
    if trouble == "killed":
        redis_server.kill()
    else:
        redis_server.send(signal.SIGSTOP)
    before = counted("unavailable")
    start = time.perf_counter()
    for i in range(100):
        assert await cache.get(b"%032d" % i, SCHEMA) is None
    assert time.perf_counter() - start < 3  # at most three waits of 50 ms, then none; each would be 5 s
    assert counted("unavailable") == before + 100
    assert (await cache.get(b"k" * 32, SCHEMA)) is not None  # what this process has, it still serves
    if trouble == "paused":
        redis_server.send(signal.SIGCONT)
        deadline = time.monotonic() + 10
        while telemetry.REDIS_UP._value.get() == 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        cache.put(b"n" * 32, vector(3))
        await cache.flush()
        assert await (await replicas()).get(b"n" * 32, SCHEMA) is not None


async def test_more_calls_at_once_than_connections_leave_a_healthy_redis_in_use(redis_server: RedisServer) -> None:
    """The values of one request of 64 pictures, in every cache, and then many look-ups side by side."""
    link = RedisLink(redis_server.url, 2.0)
    await link.start()
    names = [f"c{i}" for i in range(4)]
    caches = [ArrayCache(name, max_bytes=1 << 20, ttl=60, link=link) for name in names]
    keys = [b"%032d" % i for i in range(100)]
    for cache in caches:
        for key in keys:
            cache.put(key, vector(1, 2))
    for cache in caches:
        await cache.flush()
    assert link.available
    assert sync_redis.Redis.from_url(redis_server.url).dbsize() == 400
    others = [ArrayCache(name, max_bytes=1 << 20, ttl=60, link=link) for name in names]
    found = await asyncio.gather(*(other.get(key, SCHEMA) for other in others for key in keys[:50]))
    assert link.available
    assert all(value is not None for value in found)
    await link.close()


async def test_what_redis_refuses_is_not_held_against_it(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, 0.5)
    await link.start()
    sync_redis.Redis.from_url(redis_server.url).set("text", "x")
    for _ in range(10):
        with pytest.raises(RedisRefused) as caught:
            await link.call(lambda redis: redis.hget("text", "field"))
        assert caught.value.wrong_type
    assert link.available
    await link.close()


async def test_writes_that_redis_does_not_take_are_dropped_and_bounded(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, 0.05)
    await link.start()
    cache = ArrayCache("test", max_bytes=1 << 20, ttl=60, link=link)
    redis_server.send(signal.SIGSTOP)
    before = counted("unwritten")
    for i in range(10_000):
        cache.put(b"%032d" % i, vector(1))
    assert counted("unwritten") > before
    await asyncio.wait_for(cache.flush(), 10)
    await link.close()

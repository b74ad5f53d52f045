"""The list of a tenant's probes: newest first, in pages, of all replicas, and nothing that another writer plants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis as sync_redis

from service import probe_ledger, probe_list
from service.probe_job import Job
from service.probe_ledger import Ledger
from service.probe_list import Cursor, Page
from service.redis_link import RedisLink
from tests.service.conftest import RedisServer

SECRET = b"s" * 32
STARTED = {"label": "carrot", "unit": "1/255", "max_eps": 8.0, "clean": {"label": "carrot"}}
DONE = {"robust_to": 2.0, "broken_at": 4.0, "norm": "linf", "artefacts": {"adversarial": "data:image/png;base64,AAAA"}}


def never() -> Any:
    raise AssertionError


def new_job() -> Job:
    about = {"encoder": {"name": "tiny", "digest": "0", "dtype": "float32", "head": "cosine"}}
    return Job(never, asyncio.get_running_loop(), seconds=5, about={**about, "defence": {"name": "none"}})


async def begun(ledger: Ledger, tenant: str = "acme") -> Job:
    """A probe of a moment of its own."""
    job = new_job()
    await ledger.add(job, tenant)
    await asyncio.sleep(0.002)
    return job


def ids(page: Page) -> list[str]:
    return [one.row["id"] for one in page.probes]


async def paged(ledger: Ledger, limit: int, tenant: str = "acme") -> list[str]:
    """Every probe, a page at a time."""
    found: list[str] = []
    page = await ledger.page(tenant, limit)
    while True:
        found += ids(page)
        if not page.more:
            return found
        assert len(page.probes) == limit
        page = await ledger.page(tenant, limit, Cursor.read(str(page.probes[-1].at)))


@pytest.fixture
async def ledgers(redis_server: RedisServer) -> AsyncIterator[list[Ledger]]:
    """Those of two replicas."""
    links = [RedisLink(redis_server.url, 2.0) for _ in range(2)]
    for link in links:
        await link.start()
    found = [Ledger(link, "t", SECRET, 60) for link in links]
    yield found
    for ledger in found:
        await ledger.close()
    for link in links:
        await link.close()


@pytest.mark.anyio
async def test_what_a_list_tells_grows_with_the_probe_and_has_no_pictures() -> None:
    ledger = Ledger(None, "t", b"", ttl=60)
    job = await begun(ledger)

    async def row() -> dict[str, Any]:
        await asyncio.sleep(0)
        page = await ledger.page("acme", 10)
        assert not page.partial
        (one,) = page.probes
        return one.row

    waiting = await row()
    assert (waiting["status"], waiting["started"], waiting["label"]) == ("queued", None, None)
    assert waiting["encoder"]["name"] == "tiny"
    job.started = 1e9  # far ahead, by the monotonic clock
    job.emit("started", STARTED)
    job.emit("progress", {"gradients": 3, "elapsed": 0.1, "robust_to": 1.0, "broken_at": None})
    running = await row()
    assert (running["status"], running["label"], running["robust_to"], running["broken_at"]) == (
        "running",
        "carrot",
        1.0,
        None,
    )
    assert running["started"] > running["created"]
    job.emit("done", DONE)
    done = await row()
    assert (done["status"], done["robust_to"], done["broken_at"]) == ("done", 2.0, 4.0)
    assert "data:" not in str(done)
    failing = await begun(ledger)
    failing.emit("failed", {"error": {"code": "internal-error"}})
    await asyncio.sleep(0)
    assert (await ledger.page("acme", 1)).probes[0].row["error"] == {"code": "internal-error"}


@pytest.mark.anyio
async def test_any_replica_lists_a_tenants_probes_in_pages(ledgers: list[Ledger], redis_server: RedisServer) -> None:
    jobs = [await begun(ledgers[number % 2]) for number in range(7)]
    other = await begun(ledgers[0], "beta")
    open_one = await begun(ledgers[0], "")
    newest_first = [job.id for job in reversed(jobs)]
    for ledger in ledgers:
        assert ids(await ledger.page("acme", 100)) == newest_first
        assert [await paged(ledger, limit) for limit in (1, 3, 7)] == 3 * [newest_first]
        assert await paged(ledger, 5, "beta") == [other.id]
        assert await paged(ledger, 5, "") == [open_one.id]
        assert await paged(ledger, 5, "nobody") == []
    # What is begun between two pages moves nobody.
    first = await ledgers[1].page("acme", 3)
    jobs.append(await begun(ledgers[0]))
    second = await ledgers[1].page("acme", 3, first.probes[-1].at)
    assert ids(first) + ids(second) == newest_first[:6]
    # How one stands is told elsewhere as it is told here.
    jobs[0].emit("started", STARTED)
    jobs[0].emit("done", DONE)
    for job in [*jobs[1:], other, open_one]:
        job.emit("cancelled", {})
    await asyncio.sleep(0.6)
    here, there = [(await ledger.page("acme", 100)).probes for ledger in ledgers]
    assert here == there
    assert here[-1].row["status"] == "done"
    assert here[-1].row["broken_at"] == 4.0
    # One that has been forgotten leaves the index.
    writer = sync_redis.Redis.from_url(redis_server.url)
    writer.delete(f"t:tenant:acme:probe:{jobs[0].id}")
    assert jobs[0].id not in ids(await ledgers[1].page("acme", 100))
    assert writer.zscore("t:tenant:acme:probes", jobs[0].id) is None
    assert writer.ttl("t:tenant:acme:probes") > 60


@pytest.mark.anyio
async def test_what_another_writer_plants_is_not_listed(ledgers: list[Ledger], redis_server: RedisServer) -> None:
    jobs = [await begun(ledgers[0]) for _ in range(3)]
    theirs = await begun(ledgers[0], "beta")
    for job in [*jobs, theirs]:
        job.emit("cancelled", {})
    await asyncio.sleep(0)
    await ledgers[0].close()  # all is written
    writer = sync_redis.Redis.from_url(redis_server.url)
    index, far = "t:tenant:acme:probes", 10**14
    # Ids that lead nowhere, to another tenant's, to a copy of another's, to what is no probe; and one that is moved.
    writer.zadd(index, {"\xff/:\0": far, "nowhere": far, theirs.id: far, jobs[1].id: far, "string": far})
    copy: Any = writer.hgetall(f"t:tenant:acme:probe:{jobs[0].id}")
    writer.hset("t:tenant:acme:probe:copied", mapping=copy)
    writer.set("t:tenant:acme:probe:string", "x")
    writer.zadd(index, {f"planted{i}": far - i for i in range(200)} | {"copied": far})
    assert ids(await ledgers[1].page("acme", 2)) == [jobs[2].id, jobs[0].id]
    assert ids(await ledgers[0].page("acme", 9)) == [job.id for job in reversed(jobs)]  # its own it knows


@pytest.mark.anyio
async def test_the_index_is_bounded(
    ledgers: list[Ledger], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_list, "_MOST", 4)
    jobs = [await begun(ledgers[0]) for _ in range(6)]
    for job in jobs:
        job.emit("cancelled", {})
    await ledgers[0].close()
    assert sync_redis.Redis.from_url(redis_server.url).zcard("t:tenant:acme:probes") == 4
    assert ids(await ledgers[1].page("acme", 9)) == [job.id for job in reversed(jobs[2:])]


@pytest.mark.anyio
async def test_one_whose_replica_is_gone_has_failed(
    ledgers: list[Ledger], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_ledger, "_DOUBT_SECONDS", 0.2)
    job = await begun(ledgers[0])
    for task in ledgers[0]._mirrors:
        task.cancel()  # it is killed
    sync_redis.Redis.from_url(redis_server.url).delete(f"t:tenant:acme:probe:{job.id}:alive")
    assert (await ledgers[1].page("acme", 9)).probes[0].row["status"] == "queued"  # missed for the first time
    await asyncio.sleep(0.3)
    row = (await ledgers[1].page("acme", 9)).probes[0].row
    assert row["status"] == "failed"
    assert "is gone" in row["error"]["detail"]


@pytest.mark.anyio
async def test_while_redis_is_away_a_list_says_that_it_is_not_whole(
    ledgers: list[Ledger], redis_server: RedisServer
) -> None:
    mine, theirs = [await begun(ledger) for ledger in ledgers]
    assert ids(await ledgers[0].page("acme", 9)) == [theirs.id, mine.id]
    redis_server.kill()
    page = await ledgers[0].page("acme", 9)
    assert (ids(page), page.partial) == ([mine.id], True)
    for job in (mine, theirs):
        job.emit("cancelled", {})

"""Tenants: nothing of one is seen, changed or noticed by another, and a writer to Redis cannot plant anything."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis as sync_redis

from ironclip.errors import LabelSetNotFound, Unavailable
from ironclip.labels import LabelLimits
from service.cache import ArrayCache
from service.errors import ProbeNotFound
from service.label_sets import LabelSets, parse_document
from service.label_stores import Expect, FileStore, RedisStore
from service.probe_job import Job
from service.probe_ledger import Ledger
from service.redis_link import RedisLink
from service.seal import NotSigned, Seal
from service.vectors import pack
from tests.service.conftest import Locked, RedisServer, as_base64, picture

LABELS = ["carrot", "rocket"]
ANY = Expect()
BUILT_IN = {"shipped": parse_document("shipped", {"labels": ["a", "b"]}, read_only=True)}


def cached(client: httpx.Client, path: str, body: dict[str, Any]) -> bool:
    """Whether the answer came from a cache, as it says itself."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return "hit" in answer.headers["cache-status"]


@pytest.mark.parametrize("defence", ["none", "cola"])
def test_what_one_tenant_asked_is_new_when_another_asks_it(locked: Locked, defence: str) -> None:
    seed = {"none": 100, "cola": 101}[defence]
    body = {"image": as_base64(picture(seed)), "labels": LABELS, "defence": defence}
    with locked.client("acme") as acme, locked.client("acme-2") as same, locked.client("beta") as beta:
        assert [cached(acme, "/classify", body) for _ in range(2)] == [False, True]
        assert cached(same, "/classify", body)  # another key of the tenant
        assert [cached(beta, "/classify", body) for _ in range(2)] == [False, True]
        with locked.client("open") as nobody:
            assert not cached(nobody, "/classify", body)


def test_what_one_tenant_embedded_is_new_when_another_embeds_it(locked: Locked) -> None:
    body = {"images": [as_base64(picture(102))]}
    with locked.client("acme") as acme, locked.client("beta") as beta:
        assert [cached(acme, "/embed", body) for _ in range(2)] == [False, True]
        assert [cached(beta, "/embed", body) for _ in range(2)] == [False, True]


def test_texts_that_one_tenant_had_encoded_are_encoded_again_for_another(locked: Locked) -> None:
    """What is to be encoded is paid for, so the price tells whether the texts were known."""
    body = {"image": as_base64(picture(103)), "labels": [f"label {i}" for i in range(40)], "templates": ["{}"]}

    def price(client: httpx.Client) -> int:
        def left(answer: httpx.Response) -> int:
            assert answer.status_code == 200
            return int(re.findall(r"r=(\d+)", answer.headers["ratelimit"])[0])

        return left(client.get("/models")) - left(client.post("/classify", json=body))

    with locked.client("paying") as one, locked.client("other-paying") as other:
        assert [price(one), price(one)] == [11, 1]
        assert [price(other), price(other)] == [11, 1]


def test_label_sets_are_the_tenants_own(locked: Locked) -> None:
    with locked.client("acme") as acme, locked.client("acme-2") as same, locked.client("beta") as beta:
        digest = acme.put("/label-sets/pets", json={"labels": ["cat", "dog"]}).json()["digest"]
        assert same.get("/label-sets/pets").json()["labels"] == ["cat", "dog"]
        asked = {"image": as_base64(picture(104)), "label_set": "pets"}
        for reference in ("pets", f"pets@{digest}"):
            assert beta.get(f"/label-sets/{reference}").status_code == 404
            assert beta.post("/classify", json={**asked, "label_set": reference}).status_code == 404
        assert "pets" not in {row["name"] for row in beta.get("/label-sets").json()["label_sets"]}
        assert beta.delete("/label-sets/pets").status_code == 404
        # The other's own set of that name is another one: as if there were none.
        made = beta.put("/label-sets/pets", json={"labels": ["newt"]}, headers={"if-none-match": "*"})
        assert made.status_code == 201
        assert beta.post("/classify", json=asked).json()["predictions"][0]["label"] == "newt"
        assert acme.get("/label-sets/pets").json()["labels"] == ["cat", "dog"]
        assert beta.delete("/label-sets/pets").status_code == 204
        assert acme.get("/label-sets/pets").status_code == 200
        with locked.client("open") as nobody:
            assert nobody.get("/label-sets/pets").status_code == 404
        # What ships with the service belongs to all, and nobody may change it.
        assert acme.get("/label-sets/emoji").json() == beta.get("/label-sets/emoji").json()
        assert acme.put("/label-sets/emoji", json={"labels": ["a"]}).status_code == 409


def test_a_probe_is_found_by_its_own_tenant_alone(locked: Locked) -> None:
    body = {"image": as_base64(picture(105)), "labels": LABELS, "effort": "quick", "max_eps": 2}
    with locked.client("acme") as acme, locked.client("prober") as same, locked.client("beta") as beta:
        started = acme.post("/attack-probe", json=body, headers={"prefer": "respond-async"})
        where = started.headers["location"]
        lists = [[row["id"] for row in who.get("/probes").json()["probes"]] for who in (acme, same, beta)]
        assert lists[0] == lists[1]
        assert lists[0][0] == started.json()["id"]
        assert started.json()["id"] not in lists[2]
        for method, path in (("GET", where), ("DELETE", where), ("GET", f"{where}/events")):
            answer = beta.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (404, "probe-not-found")
        deadline = time.monotonic() + 60
        while (standing := same.get(where).json())["status"] not in ("done", "cancelled", "failed"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert standing["status"] == "done"  # it was not the other's to cancel
        assert beta.get(where).status_code == 404
        assert "event: done" in same.get(f"{where}/events").text


# Below HTTP: both stores, another replica, and a writer to Redis.

Make = Callable[..., Awaitable[LabelSets]]


@pytest.fixture(params=["files", "redis"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Make replicas over one store; `secret` signs what is in Redis."""
    links: list[RedisLink] = []
    server: RedisServer | None = request.getfixturevalue("redis_server") if request.param == "redis" else None

    async def made(secret: bytes = b"") -> LabelSets:
        if server is None:
            return LabelSets(FileStore(tmp_path, 2), BUILT_IN, LabelLimits(labels=50))
        links.append(RedisLink(server.url, 2.0))
        await links[-1].start()
        return LabelSets(RedisStore(links[-1], "test", 2, Seal(secret)), BUILT_IN, LabelLimits(labels=50))

    yield made
    for link in links:
        await link.close()


@pytest.mark.anyio
async def test_names_versions_and_room_are_each_tenants_own(make: Make) -> None:
    sets, replica = await make(), await make()
    mine, _ = await sets.put("pets", {"labels": ["cat"]}, ANY, tenant="acme")
    await sets.put("more", {"labels": ["cat"]}, ANY, tenant="acme")
    theirs, created = await sets.put("pets", {"labels": ["dog"]}, ANY, tenant="beta")
    open_one, _ = await sets.put("pets", {"labels": ["newt"]}, ANY)
    assert created
    with pytest.raises(Exception, match="at most 2"):
        await sets.put("third", {"labels": ["cat"]}, ANY, tenant="acme")
    for seen in (sets, replica):
        assert (await seen.get("pets", tenant="acme")).digest == mine.digest
        assert (await seen.get("pets", tenant="beta")).digest == theirs.digest
        assert (await seen.get("pets")).digest == open_one.digest
        assert [name for name, _, fixed in await seen.names(tenant="acme") if not fixed] == ["more", "pets"]
        assert [name for name, _, fixed in await seen.names(tenant="gamma") if not fixed] == []
        for tenant in ("beta", "gamma", ""):
            with pytest.raises(LabelSetNotFound):
                await seen.get(f"pets@{mine.digest}", tenant=tenant)
    await sets.delete("pets", ANY, tenant="acme")
    assert (await replica.get("pets", tenant="beta")).digest == theirs.digest


@pytest.mark.anyio
async def test_sets_of_an_open_service_are_those_of_the_tenant_without_a_name(make: Make) -> None:
    """As they were stored before there were tenants: nothing has to be moved."""
    sets = await make()
    entry, _ = await sets.put("old", {"labels": ["cat"]}, ANY)
    if isinstance(sets.store, FileStore):
        assert (sets.store.root / "label-sets" / "old" / "current").read_text() == entry.digest
    else:
        assert isinstance(sets.store, RedisStore)
        assert sets.store.prefix == "test:label-set:"
    assert (await (await make()).get("old", tenant="")).digest == entry.digest


SECRET = b"s" * 32


@pytest.fixture
async def signed(redis_server: RedisServer) -> AsyncIterator[tuple[LabelSets, LabelSets, Any]]:
    """Two replicas over one Redis that sign what they write, and another writer to it."""
    links = [RedisLink(redis_server.url, 2.0) for _ in range(2)]
    for link in links:
        await link.start()
    one, two = (LabelSets(RedisStore(link, "t", 9, Seal(SECRET)), BUILT_IN, LabelLimits(labels=50)) for link in links)
    yield one, two, sync_redis.Redis.from_url(redis_server.url)
    for link in links:
        await link.close()


@pytest.mark.anyio
async def test_a_label_set_that_another_writer_plants_is_not_used(signed: tuple[LabelSets, LabelSets, Any]) -> None:
    one, two, writer = signed
    planted = parse_document("pets", {"labels": ["planted"]})
    document = b'{"labels": ["planted"]}'
    writer.hset("t:tenant:acme:label-set:pets", mapping={planted.digest: document, "current": planted.digest})
    writer.sadd("t:tenant:acme:label-sets", "pets")
    for reference in ("pets", f"pets@{planted.digest}"):
        with pytest.raises(Unavailable, match=r"not signed.*put the label set again"):
            await one.get(reference, tenant="acme")
    assert [name for name, _, fixed in await one.names(tenant="acme") if not fixed] == []
    # Put again, it is there; a condition on it is one on a set that does not exist yet.
    _, created = await one.put("pets", {"labels": ["real"]}, Expect(if_none_match=("*",)), tenant="acme")
    assert created
    assert (await two.get("pets", tenant="acme")).label_set.names == ("real",)
    with pytest.raises(Unavailable, match="not signed"):
        await two.get(f"pets@{planted.digest}", tenant="acme")


@pytest.mark.anyio
async def test_a_signed_label_set_counts_where_it_was_put_and_nowhere_else(
    signed: tuple[LabelSets, LabelSets, Any],
) -> None:
    one, two, writer = signed
    await one.put("pets", {"labels": ["cat"]}, ANY, tenant="acme")
    stored = writer.hgetall("t:tenant:acme:label-set:pets")
    for key in ("t:tenant:beta:label-set:pets", "t:tenant:acme:label-set:other", "t:label-set:pets"):
        writer.hset(key, mapping=stored)
    with pytest.raises(Unavailable, match="not signed"):
        await two.get("pets", tenant="beta")
    with pytest.raises(Unavailable, match="not signed"):
        await two.get("other", tenant="acme")
    with pytest.raises(Unavailable, match="not signed"):
        await two.get("pets")
    # A version in place of the newest, and a document in place of another.
    second, _ = await one.put("pets", {"labels": ["dog"]}, ANY, tenant="acme")
    first_digest = next(name for name in stored if len(name) == 64)
    writer.hset("t:tenant:acme:label-set:pets", second.digest, stored[first_digest])
    with pytest.raises(Unavailable, match="not signed"):
        await two.get("pets", tenant="acme")
    await two.delete("other", ANY, tenant="acme")
    with pytest.raises(LabelSetNotFound):
        await two.get("other", tenant="acme")


@pytest.mark.anyio
async def test_sets_from_before_the_secret_are_refused_until_they_are_put_again(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, 2.0)
    await link.start()
    before = LabelSets(RedisStore(link, "t"), {}, LabelLimits(labels=9))
    await before.put("pets", {"labels": ["cat"]}, ANY)
    after = LabelSets(RedisStore(link, "t", seal=Seal(SECRET)), {}, LabelLimits(labels=9))
    with pytest.raises(Unavailable, match="put the label set again"):
        await after.get("pets")
    await after.put("pets", {"labels": ["cat"]}, ANY)
    assert (await after.get("pets")).label_set.names == ("cat",)
    await link.close()


def test_a_seal_is_bound_to_secret_place_and_content() -> None:
    seal = Seal(SECRET)
    blob = seal.close("acme/pets/current", b"content with spaces")
    assert seal.open("acme/pets/current", blob) == b"content with spaces"
    for other, place, value in (
        (Seal(b"another secret"), "acme/pets/current", blob),
        (seal, "acme/pet/current", blob),
        (seal, "acme/pets/current", blob + b"x"),
        (seal, "acme/pets/current", b"content with spaces"),
        (seal, "acme/pets/current", b""),
        (seal, "acme/pets/current", b"\xff " + blob),
    ):
        with pytest.raises(NotSigned):
            other.open(place, value)
    assert Seal().open("x", Seal().close("x", b"plain")) == b"plain"


@pytest.mark.anyio
async def test_a_probe_of_another_replica_is_found_by_its_own_tenant_alone(redis_server: RedisServer) -> None:
    links = [RedisLink(redis_server.url, 2.0) for _ in range(2)]
    for link in links:
        await link.start()
    here, there = (Ledger(link, "t", SECRET, 60) for link in links)

    def never() -> Any:
        raise AssertionError

    job = Job(never, asyncio.get_running_loop(), seconds=5)
    await here.add(job, "acme")
    job.emit("cancelled", {})
    await job.wait()
    await here.close()
    assert [event.kind for event in await there.events(job.id, "acme")] == ["cancelled"]
    for ledger in (here, there):
        for tenant in ("beta", ""):
            with pytest.raises(ProbeNotFound):
                await ledger.events(job.id, tenant)
            with pytest.raises(ProbeNotFound):
                await ledger.cancel(job.id, tenant)
    # Copied by another writer to where the other tenant looks: the signature is for another place.
    writer = sync_redis.Redis.from_url(redis_server.url)
    writer.hset(f"t:tenant:beta:probe:{job.id}", mapping=writer.hgetall(f"t:tenant:acme:probe:{job.id}"))
    assert await there.events(job.id, "beta") == []
    for link in links:
        await link.close()


def test_a_cached_value_that_another_writer_changes_or_moves_is_not_used(locked: Locked) -> None:
    """What one replica has written is read by another from where it was put, as it was put, and nowhere else."""
    writer = sync_redis.Redis.from_url(locked.redis.url)
    body = {"image": as_base64(picture(106)), "labels": LABELS}

    def written(name: str) -> bytes:
        """Where the service keeps the scores of this tenant's request."""
        known = set(writer.keys("ironclip:cache:scores:*"))
        with locked.client(name) as client:
            assert not cached(client, "/classify", body)
        deadline = time.monotonic() + 10
        while not (fresh := set(writer.keys("ironclip:cache:scores:*")) - known):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (place,) = fresh
        return bytes(place)

    mine, theirs = written("acme"), written("beta")
    value = bytes(writer.get(mine))  # type: ignore[arg-type]
    assert read_by_a_replica(locked, mine) is not None
    key = bytes.fromhex(theirs.rpartition(b":")[2].decode())
    scores = {"logits": np.zeros(2, np.float32), "cosine": np.zeros(2, np.float32)}
    for planted in (value, value[:-1] + bytes([value[-1] ^ 1]), pack(scores, key=key), b"ICV1"):
        writer.set(theirs, planted)
        assert read_by_a_replica(locked, theirs) is None


def read_by_a_replica(locked: Locked, place: bytes) -> object:
    """The scores that another replica finds there, with the same secret."""

    async def look() -> object:
        link = RedisLink(locked.redis.url, 2.0)
        await link.start()
        cache = ArrayCache("scores", max_bytes=1 << 20, ttl=60, link=link, secret=locked.mac_key.encode())
        key = bytes.fromhex(place.rpartition(b":")[2].decode())
        found = await cache.get(key, {"logits": ("float32", (2,)), "cosine": ("float32", (2,))})
        await link.close()
        return found

    return asyncio.run(look())

"""Rate limits in points: what requests cost, what comes back, what the answers say, and what holds without Redis."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis as sync_redis

from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet
from service.cache import ArrayCache
from service.decisions import Classifiers, Plan
from service.keys import Caller
from service.rate_limits import Bucket, Limiter, Meter
from service.redis_link import RedisLink
from service.runtime import ServedEncoder
from service.together import REFUSED, together
from tests.service.conftest import Locked, RedisServer, as_base64, metric, picture

LABELS = ["carrot", "rocket"]
SLOW = Caller("acme", "key1", frozenset({"infer"}), points_per_minute=1, burst=20)


def left(answer: httpx.Response) -> int:
    """Points left, as the answer says."""
    form = re.fullmatch(r'"points";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert form is not None
    return int(form.group(1))


def ask(client: httpx.Client, seed: int, **others: object) -> httpx.Response:
    return client.post("/classify", json={"image": as_base64(picture(seed)), "labels": LABELS, **others})


@pytest.fixture
async def link(redis_server: RedisServer) -> AsyncIterator[RedisLink]:
    link = RedisLink(redis_server.url, 2.0)
    await link.start()
    yield link
    await link.close()


def test_a_bucket_fills_at_its_rate_and_never_over() -> None:
    bucket = Bucket(10, 0.0)
    assert bucket.take(8, 10, 2.0, 0.0)
    assert not bucket.take(3, 10, 2.0, 0.0)
    assert bucket.take(3, 10, 2.0, 0.5)
    assert bucket.left == 0
    assert bucket.take(-50, 10, 2.0, 0.5)
    assert bucket.left == 10
    assert bucket.take(10, 10, 2.0, 1e6)
    assert not bucket.take(1, 10, 2.0, 5.0)  # a clock that goes back fills nothing


@pytest.mark.anyio
@pytest.mark.parametrize("store", ["redis", "local"])
async def test_points_that_are_there_are_given_once_however_many_ask(link: RedisLink, store: str) -> None:
    there = link if store == "redis" else None
    replicas = [Limiter(there, "test") for _ in range(2 if there else 1)]
    taken = await asyncio.gather(*(replicas[i % len(replicas)].take(SLOW, 1) for i in range(50)))
    assert sum(one.paid for one in taken) == 20
    assert {one.store for one in taken} == {store}
    assert (await replicas[0].take(SLOW, 0)).left < 1
    assert (await replicas[0].take(SLOW, -5)).left == pytest.approx(5, abs=0.2)
    assert (await replicas[0].take(SLOW, -500)).left == 20


@pytest.mark.anyio
async def test_points_come_back_at_the_rate(link: RedisLink) -> None:
    fast = Caller("acme", "key2", frozenset({"infer"}), points_per_minute=600, burst=5)
    for limiter in (Limiter(link, "test"), Limiter(None, "test")):
        assert (await limiter.take(fast, 5)).paid
        assert not (await limiter.take(fast, 5)).paid
        began = time.monotonic()
        while not (await limiter.take(fast, 2)).paid:
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.02)
        assert time.monotonic() - began > 0.1  # two points at ten a second


@pytest.mark.anyio
@pytest.mark.parametrize(
    "planted",
    [{"left": "nan", "at": "nan"}, {"left": "1e300", "at": "1"}, {"left": "x"}, {"left": "-inf", "at": "9e15"}],
)
async def test_what_another_writer_puts_there_is_between_empty_and_full(
    link: RedisLink, redis_server: RedisServer, planted: dict[str, str]
) -> None:
    sync_redis.Redis.from_url(redis_server.url).hset("test:rate:key1", mapping=planted)
    limiter = Limiter(link, "test")
    seen = await limiter.take(SLOW, 0)
    assert 0 <= seen.left <= 20
    assert (await limiter.take(SLOW, -20)).left == pytest.approx(20)
    assert (await limiter.take(SLOW, 20)).paid


@pytest.mark.anyio
async def test_a_key_of_another_kind_does_not_stop_anybody(link: RedisLink, redis_server: RedisServer) -> None:
    sync_redis.Redis.from_url(redis_server.url).set("test:rate:key1", "a text")
    taken = await Limiter(link, "test").take(SLOW, 1)
    assert (taken.paid, taken.store) == (True, "fallback")


@pytest.mark.anyio
async def test_what_the_service_does_not_do_is_not_paid_for(link: RedisLink) -> None:
    from ironclip.errors import DeadlineExceeded, ImageInvalid, Overloaded

    limiter = Limiter(link, "test")

    async def spend(error: Exception) -> float:
        with pytest.raises(type(error)):
            async with Meter(limiter, SLOW).paid(5):
                raise error
        return (await limiter.take(SLOW, 0)).left

    assert await spend(Overloaded("full", retry_after=1)) == pytest.approx(20, abs=0.2)
    assert await spend(RuntimeError("a fault")) == pytest.approx(20, abs=0.2)
    assert await spend(ImageInvalid("broken")) == pytest.approx(15, abs=0.3)
    assert await spend(DeadlineExceeded("late")) == pytest.approx(10, abs=0.4)
    given_up = DeadlineExceeded("given up")
    given_up.unbegun = True
    assert await spend(given_up) == pytest.approx(10, abs=0.5)


@pytest.mark.anyio
async def test_what_is_asked_is_counted_of_who_is_not_limited_too(link: RedisLink) -> None:
    """An answer that is kept says what it costs whoever repeats it, and that may be another key."""
    free = Meter(Limiter(link, "test"), Caller("acme", "free1", frozenset({"infer"})))
    async with free.paid(3):
        pass
    assert (free.limited, free.spent) == (False, 3)
    store = await free.pay(2)
    await free.give_back(2, store)
    assert free.spent == 3


def test_what_is_refused_and_paid_back_is_not_done(locked: Locked) -> None:
    texts = [f"text {number}" for number in range(256)]
    encoded = 'ironclip_batch_size_sum{tower="text"}'
    with locked.client("paying") as client:
        before = metric(locked.metrics_url, encoded)
        refused = {"images": [as_base64(picture(9000))], "texts": texts, "defence": "cola", "label_set": "nope"}
        assert client.post("/embed", json=refused).status_code == 404
        time.sleep(1)
        assert metric(locked.metrics_url, encoded) - before <= 64
        answer = client.post("/embed", json={"texts": texts})
        assert answer.status_code == 200
        assert metric(locked.metrics_url, encoded) - before >= 256


def test_every_answer_of_a_limited_key_says_what_is_left(locked: Locked) -> None:
    with locked.client("paying") as client:
        for answer in (client.get("/models"), client.get("/nowhere"), client.post("/classify", content=b"x")):
            assert answer.headers["ratelimit-policy"] == '"points";q=100000;w=6000000'
            assert left(answer) <= 100_000
        refused = client.get("/metrics")
        assert (refused.status_code, "ratelimit" in refused.headers) == (404, True)
    with locked.client("acme") as client:
        assert "ratelimit" not in client.get("/models").headers
    assert "ratelimit" not in httpx.get(f"{locked.url}/livez").headers


def test_what_requests_cost(locked: Locked) -> None:
    with locked.client("paying") as client:

        def cost(answer: httpx.Response, expected: int = 200) -> int:
            nonlocal before
            assert answer.status_code == expected, answer.text
            spent, before = before - left(answer), left(answer)
            return spent

        before = left(client.get("/models"))
        assert cost(ask(client, 1, labels=["a", "b", "c", "d"], templates=["{}"])) == 2  # one picture, four texts
        assert cost(ask(client, 2, labels=["a", "b", "c", "d"], templates=["{}"])) == 1  # the texts are known
        assert cost(ask(client, 2, labels=["a", "b", "c", "d"], templates=["{}"])) == 1  # a known picture is as dear
        cola = {"name": "cola", "views": 5}
        forwards = next(one for one in client.get("/models").json()["defence_details"] if one["name"] == "cola")["cost"]
        assert forwards > 1
        asked = cost(ask(client, 3, labels=["a", "b", "c", "d"], templates=["{}"], defence=cola))
        assert asked in (forwards, forwards + 1)  # its text bank may be another one
        image = as_base64(picture(4))
        assert cost(client.post("/embed", json={"images": [image, "?"], "texts": ["a", "b", "c", "d"]})) == 3
        assert cost(client.post("/v1/embeddings", json={"input": ["a"] * 8})) == 2
        # A file of vectors cannot hold an error: refused before any work, or what it took to find out is paid for.
        npy = {"accept": "application/x-npy"}
        fresh = [as_base64(picture(seed)) for seed in (40, 41)]
        assert cost(client.post("/embed", json={"images": fresh, "texts": [" "]}, headers=npy), 422) == 0
        assert cost(client.post("/embed", json={"images": [*fresh, "?"]}, headers=npy), 422) == 0
        long = "many words " * 60
        assert (
            cost(client.post("/embed", json={"images": fresh, "texts": ["a", "b", "c", long]}, headers=npy), 422) == 3
        )
        # Refused before any work, and after it was paid for.
        assert cost(client.post("/classify", json={"image": image}), 422) == 0
        assert cost(ask(client, 5, labels=["long " * 150, "b"], templates=["{}"]), 422) == 0
        assert cost(client.post("/classify", json={"image": image, "labels": ["a"], "encoder": "none"}), 404) == 0


def test_a_picture_that_cannot_be_read_costs_one_point_whatever_stands_before_it(locked: Locked) -> None:
    """To take it out of the request and look at it is work, but it is seen through no defence."""
    junk, cut = as_base64(b"no picture at all"), as_base64(picture(50)[:-40])
    cola = {"name": "cola", "views": 5}
    with locked.client("paying") as client:
        ask(client, 51, labels=["a", "b"], templates=["{}"], defence=cola)  # so that the texts are known
        assert client.put("/label-sets/junk", json={"labels": ["a", "b"], "templates": ["{}"]}).status_code == 201
        before = left(client.get("/models"))

        def cost(path: str, *images: str, status: int = 200, **options: object) -> int:
            nonlocal before
            answer = client.post(path, json={"images": list(images), **options})
            assert answer.status_code == status, answer.text
            spent, before = before - left(answer), left(answer)
            return spent

        labels: dict[str, Any] = {"labels": ["a", "b"], "templates": ["{}"]}
        assert cost("/classify", junk, "?", cut, **labels) == 3
        assert cost("/classify", junk, "?", cut, **labels, defence=cola) == 3
        assert cost("/classify", junk, as_base64(picture(52)), **labels, defence=cola) == 6
        assert cost("/embed", junk, "?", cut) == 3
        assert cost("/embed", junk, "?", cut, defence=cola, label_set="junk") == 3
        # The service refuses the whole, and has looked at none of them.
        assert cost("/embed", junk, defence=cola, label_set="nope", status=404) == 0
        single = client.post("/classify", json={"image": cut, **labels, "defence": cola})
        assert (single.status_code, before - left(single)) == (422, 1)


def test_a_probe_is_paid_for_by_the_gradients_it_took(locked: Locked) -> None:
    body = {"image": as_base64(picture(7)), "labels": LABELS, "effort": "quick", "max_eps": 4}
    with locked.client("paying") as client:
        ask(client, 7)  # so that the texts are known
        before = left(client.get("/models"))
        dry = client.post("/attack-probe", json={**body, "dry_run": True})
        most = dry.json()["dry_run"]["points_at_most"]
        assert most == pytest.approx(dry.json()["dry_run"]["tower_passes_at_most"] / 3, abs=0.01)
        assert left(dry) == before
        done = client.post("/attack-probe", json=body)
        assert done.status_code == 200
        used = done.json()["cost"]["tower_passes"] / 3
        assert before - left(done) == pytest.approx(used, abs=1)  # the header has whole points
        assert used < most
        before = left(done)
        started = client.post("/attack-probe", json=body, headers={"prefer": "respond-async"})
        where = started.headers["location"]
        deadline = time.monotonic() + 30
        while (standing := client.get(where).json())["status"] not in ("done", "failed"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        used = standing["result"]["cost"]["tower_passes"] / 3
        while abs(before - left(client.get("/models")) - used) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wrong = client.post("/attack-probe", json={**body, "label": "not there"})
        assert wrong.status_code == 422
        assert before - left(wrong) == pytest.approx(used, abs=1)
        # What asks no gradient is work too.
        before = left(wrong)
        blind = client.post("/attack-probe", json={**body, "max_eps": 1, "attack": "square"})
        cost = blind.json()["cost"]
        assert cost["gradients"] == 0
        assert before - left(blind) == pytest.approx(cost["tower_passes"] / 3, abs=1)
        assert before - left(blind) > 1


def test_a_key_gets_the_probe_that_it_can_pay_for(locked: Locked) -> None:
    """The key of the README runs the playground's probe through COLA; a dearer effort gets what the key affords."""
    body = {"image": as_base64(picture(8)), "labels": LABELS, "defence": "cola", "max_eps": 16, "dry_run": True}
    with locked.client("paying") as client:
        dry = client.post("/attack-probe", json=body).json()["dry_run"]
    assert dry["points_at_most"] < 6000
    with locked.client("modest") as client:
        ask(client, 8)  # so that the texts are known
        # No cosine is ever so low: the attack goes on to its end.
        few = {"image": body["image"], "objective": "embedding", "cosine_below": -1, "eps": [1], "dry_run": True}
        clipped = client.post("/attack-probe", json=few).json()["dry_run"]
        assert 0 < clipped["points_at_most"] <= 20
        few["dry_run"] = False
        deadline = time.monotonic() + 30
        while (answer := client.post("/attack-probe", json=few)).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["status"] == "budget_exhausted"
        assert any(warning["code"] == "unfinished" for warning in found["warnings"])
        # Whoever names a budget is told what it costs.
        refused = client.post("/attack-probe", json={**few, "gradients": 100})
        assert (refused.status_code, refused.json()["code"]) == (413, "cost-too-high")


def test_a_spent_key_is_told_when_to_come_again_and_is_then_served(locked: Locked) -> None:
    with locked.client("quick") as client:
        ask(client, 10)
        for seed in range(11, 40):
            answer = ask(client, seed)
            if answer.status_code == 429:
                break
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["limit"]) == (429, "rate-limited", 5)
        assert answer.headers["retry-after"] == "1"
        assert 0 < problem["retry_after_ms"] <= 1000
        assert "burst of the API key quick1 in the keys file" in problem["detail"]
        assert left(answer) == 0
        time.sleep(int(answer.headers["retry-after"]))
        assert ask(client, 99).status_code == 200
    label = 'ironclip_rate_limits_total{result="refused",store="redis"}'
    assert metric(locked.metrics_url, label) >= 1


def test_what_can_never_be_paid_is_refused_for_good(locked: Locked) -> None:
    with locked.client("slow") as client:
        answer = client.post("/embed", json={"texts": ["x"] * 100})
        assert (answer.status_code, answer.json()["code"]) == (413, "cost-too-high")
        assert "retry-after" not in answer.headers
        assert answer.json()["limit"] == 20
        openai = client.post("/v1/embeddings", json={"input": ["x"] * 100})
        assert (openai.status_code, openai.json()["error"]["code"]) == (413, "cost-too-high")
        assert client.post("/v1/embeddings", json={"input": ["x"] * 60}).status_code == 200
        spent = client.post("/v1/embeddings", json={"input": ["x"] * 60})
        assert (spent.status_code, spent.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(spent.headers["retry-after"]) > 60


def test_a_spent_key_is_refused_before_its_body_is_read(locked: Locked) -> None:
    """A client that asks first is not told to go on."""
    one = {"texts": ["x"]}
    with locked.client("slow") as client:
        while client.post("/embed", json=one).status_code == 200:
            pass
        key, url = client.headers["authorization"], httpx.URL(client.base_url)
    head = (
        f"POST /classify HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
        "Content-Length: 10000000\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    for _ in range(20):  # what Redis said is believed for a second; after it the next request asks again
        with socket.create_connection((url.host, url.port or 80), 10) as connection:
            connection.sendall(head.encode())
            answer = connection.makefile("rb").read(4096)
        if answer.startswith(b"HTTP/1.1 429"):
            break
        with locked.client("slow") as client:
            client.post("/embed", json=one)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"A request costs at least 0.25 points" in answer
    assert b'ratelimit: "points";r=0;' in answer.lower()


def test_without_redis_each_replica_counts_for_itself_and_nobody_is_refused(locked: Locked) -> None:
    label = 'ironclip_rate_limits_total{result="allowed",store="fallback"}'
    before = metric(locked.metrics_url, label)
    locked.redis.send(signal.SIGSTOP)
    try:
        with locked.client("other-paying") as client:
            answers = [ask(client, seed) for seed in range(50, 56)]
            assert [answer.status_code for answer in answers] == [200] * 6
            assert left(answers[-1]) < left(answers[0])
        assert metric(locked.metrics_url, label) > before
    finally:
        locked.redis.send(signal.SIGCONT)
    deadline = time.monotonic() + 20
    while metric(locked.metrics_url, "ironclip_redis_up") != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.anyio
async def test_what_ends_since_another_part_was_refused_is_not_paid_for(link: RedisLink) -> None:
    from ironclip.errors import ImageInvalid, Overloaded

    limiter = Limiter(link, "test")

    async def spend(error: Exception) -> float:
        meter = Meter(limiter, SLOW)

        async def paid() -> None:
            async with meter.paid(5):
                await asyncio.sleep(60)

        async def refused() -> None:
            await asyncio.sleep(0.05)
            raise error

        with pytest.raises(type(error)):
            await together([paid(), refused()])
        await asyncio.sleep(0.05)
        return (await limiter.take(SLOW, 0)).left

    assert await spend(Overloaded("full", retry_after=1)) == pytest.approx(20, abs=0.2)
    assert await spend(ImageInvalid("broken")) == pytest.approx(15, abs=0.3)


@pytest.mark.anyio
async def test_what_is_paid_once_is_no_part_of_what_it_costs_again(link: RedisLink) -> None:
    meter = Meter(Limiter(link, "test"), SLOW)
    async with meter.paid(3), meter.paid(4, again=False):
        pass
    assert meter.spent == 3
    with pytest.raises(RuntimeError):
        async with meter.paid(2, again=False):
            raise RuntimeError
    assert meter.spent == 3


def test_long_labels_are_paid_for_as_they_are_read(locked: Locked) -> None:
    """Also those that turn out to be none: to find that out is the work."""
    labels = [f"{number:06d} " + "x" * 400 for number in range(500)]
    with locked.client("paying") as client:
        before = left(client.get("/models"))
        answer = client.post("/classify", json={"image": as_base64(picture(301)), "labels": [*labels, labels[0]]})
        assert answer.status_code == 422
        assert before - left(answer) == 3


def test_texts_that_several_wait_for_are_paid_for_once(locked: Locked) -> None:
    labels = {"labels": [f"together {number}" for number in range(1000)], "templates": ["{}"]}
    bodies = [{"image": as_base64(picture(seed)), **labels} for seed in range(310, 316)]
    with locked.client("paying") as client, ThreadPoolExecutor(len(bodies)) as pool:
        before = left(client.get("/models"))
        answers = list(pool.map(lambda body: client.post("/classify", json=body), bodies))
        assert [answer.status_code for answer in answers] == [200] * len(bodies)
        assert before - left(client.get("/models")) == 250 + len(bodies)


@pytest.mark.anyio
async def test_whoever_is_refused_leaves_the_texts_to_be_paid_for_by_the_others(tiny_encoder: Encoder) -> None:
    limiter, buyers = Limiter(None, "test"), []
    plenty = Caller("", "key1", frozenset({"infer"}), points_per_minute=1, burst=1000)
    served = ServedEncoder("tiny", tiny_encoder, dtype="float32")
    served.start()
    try:
        classifiers = Classifiers(ArrayCache("test", max_bytes=1 << 20, ttl=60), 1 << 20)
        label_set = LabelSet.parse([f"label {number}" for number in range(400)], ["{}"])
        plan = Plan(served, label_set, None, "rollup", make_defence(), {})
        for _ in range(3):
            buyers.append(asyncio.ensure_future(classifiers.bought(plan, Meter(limiter, plenty))))
        await asyncio.sleep(0.01)
        buyers[0].cancel(REFUSED)
        await asyncio.wait(buyers)
        assert buyers[0].cancelled()
        assert all(one.result() is not None for one in buyers[1:])
        assert (await limiter.take(plenty, 0)).left == pytest.approx(900, abs=1)
        await classifiers.bought(plan, Meter(limiter, plenty))
        assert (await limiter.take(plenty, 0)).left == pytest.approx(900, abs=1)
    finally:
        await served.stop()


def test_texts_are_not_paid_for_where_nobody_encodes_them(locked: Locked) -> None:
    """All scores known, none of the texts: an answer from the cache needs none of them."""
    body = {"image": as_base64(picture(302)), "labels": [f"l{number}" for number in range(100)], "templates": ["{}"]}
    with locked.client("paying") as client:
        before = left(client.get("/models"))
        costs = []
        for _ in range(3):
            answer = client.post("/classify", json=body)
            costs.append(before - left(answer))
            before = left(answer)
    assert costs == [26, 1, 1]

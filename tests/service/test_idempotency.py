"""One key, one probe: a request that is sent again begins nothing new, wherever it arrives."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client
from starlette.testclient import TestClient

from service import idempotency
from service.app import create_app
from service.idempotency import Claims, read_key
from service.redis_link import RedisLink
from service.settings import Settings
from tests.service.conftest import RedisServer, ServiceProcess, as_base64, picture, until

LABELS = ["carrot", "rocket", "cat face"]


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory, silent: int) -> Iterator[TestClient]:
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=tmp_path_factory.mktemp("state"),
        image_url_hosts=(f"localhost:{silent}",),
        image_url_networks=("127.0.0.0/8", "::1/128"),
        image_url_http=True,
        image_url_timeout_ms=3000,
        cors_origins=("https://app.example",),
    )
    with TestClient(create_app(settings)) as client:
        until(lambda: client.get("/readyz").status_code == 200, 60)
        yield client


def start(client: Any, key: str, seed: int = 1, *, image: str = "", **options: Any) -> httpx.Response:
    body = {"image": image or as_base64(picture(seed)), "labels": LABELS, "eps": [1], "gradients": 20, **options}
    headers = {"Prefer": "respond-async", "Idempotency-Key": key}
    answer: httpx.Response = client.post("/attack-probe", json=body, headers=headers)
    return answer


def test_a_repetition_is_answered_with_the_first_ones_probe(alone: TestClient) -> None:
    first = start(alone, "one")
    assert first.status_code == 202
    assert "idempotent-replayed" not in first.headers
    again = start(alone, '"one"')  # as the draft writes it
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    # The same as a form, whose boundaries nobody sees twice.
    form = alone.post(
        "/attack-probe",
        files={"image": picture(1)},
        data={"labels": LABELS, "eps": ["1"], "gradients": "20"},
        headers={"Prefer": "respond-async", "Idempotency-Key": "one"},
    )
    assert form.json()["id"] == first.json()["id"]
    until(lambda: alone.get(first.headers["location"]).json()["status"] == "done", 60)
    assert start(alone, "one").json()["status"] == "done"
    assert start(alone, "two").json()["id"] != first.json()["id"]


def test_a_key_is_for_one_request(alone: TestClient) -> None:
    first = start(alone, "mine")
    for other in (start(alone, "mine", 2), start(alone, "mine", eps=[2])):
        assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")
    assert start(alone, "mine").json()["id"] == first.json()["id"]
    assert start(alone, "no such key").status_code == 422
    for bad in ("", '"', "\t", "x" * 256):
        with pytest.raises(Exception, match="printable"):
            read_key(bad)
    # What is answered at once begins nothing that could be begun twice.
    body = {"image": as_base64(picture(3)), "labels": LABELS, "dry_run": True}
    headers = {"Prefer": "respond-async", "Idempotency-Key": "mine"}
    assert alone.post("/attack-probe", json=body, headers=headers).status_code == 200


def test_a_first_request_that_fails_leaves_its_key_free(alone: TestClient, silent: int) -> None:
    wrong = start(alone, "free", label="not there")
    assert wrong.status_code == 422
    assert start(alone, "free").status_code == 202
    # While the first is taken in, the second is told to wait; when the first has failed, the key is free.
    hangs = f"http://localhost:{silent}/picture.png"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(start, alone, "slow", image=hangs)
        until(lambda: bool(alone.app.state.service.claims._own.get(("", _place("slow")))))  # type: ignore[attr-defined]
        second = start(alone, "slow", image=hangs)
        assert (second.status_code, second.json()["code"]) == (409, "idempotency-conflict")
        assert second.headers["retry-after"] == "1"
        assert first.result(30).json()["code"] == "image-url-failed"
    assert start(alone, "slow").status_code == 202


def test_a_key_outlives_its_probe_and_begins_no_second(alone: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service = alone.app.state.service  # type: ignore[attr-defined]
    first = start(alone, "late", 5)
    until(lambda: alone.get(first.headers["location"]).json()["status"] == "done", 60)
    began = service.probes._jobs.copy()
    service.probes._jobs.clear()  # as after its time
    late = start(alone, "late", 5)
    assert (late.status_code, late.headers["idempotent-replayed"]) == (202, "true")
    assert (late.json()["id"], late.json()["status"]) == (first.json()["id"], "forgotten")
    assert alone.get(late.headers["location"]).status_code == 404
    assert not service.probes._jobs
    assert start(alone, "late", 6).json()["code"] == "idempotency-key-reused"
    clock = time.monotonic()
    monkeypatch.setattr(idempotency.time, "monotonic", lambda: clock + 25 * 3600)
    assert start(alone, "late", 6).json()["id"] not in {identity for _, identity in began}


def test_the_keys_of_one_process_are_bounded() -> None:
    async def run() -> None:
        claims = Claims(None, "x", b"", lambda *_: False, most=3)
        for number in range(5):
            claim = await claims.claim("", f"key {number}", "digest", str(number), 10)
            assert not claim.repeated
            claims.keep("", claim)
            assert len(claims._own) <= 3
        for number in (2, 3, 4):  # which takes no place from any of them
            known = await claims.claim("", f"key {number}", "digest", "new", 10)
            assert (known.identity, known.repeated, known.begun) == (str(number), True, True)
        assert not (await claims.claim("", "key 0", "digest", "new", 10)).repeated

    asyncio.run(run())


def test_a_claim_that_has_run_out_takes_no_later_one_with_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        claims = Claims(None, "x", b"", lambda *_: False)
        first = await claims.claim("", "key", "digest", "first", 1)
        clock = time.monotonic()
        monkeypatch.setattr(idempotency.time, "monotonic", lambda: clock + 60)
        second = await claims.claim("", "key", "digest", "second", 1)
        assert not second.repeated
        await claims.release("", first)
        assert (await claims.claim("", "key", "digest", "third", 1)).identity == "second"
        await claims.release("", second)
        assert (await claims.claim("", "key", "digest", "fourth", 1)).identity == "fourth"

    asyncio.run(run())


@pytest.mark.parametrize("why", ["ran out", "was unheard of"])
def test_a_replica_gives_up_its_own_claim_alone(redis_server: RedisServer, why: str) -> None:
    async def run() -> None:
        links = [RedisLink(redis_server.url, 2.0) for _ in range(2)]
        for link in links:
            await link.start()
        one, two = (Claims(link, "x", b"secret", lambda *_: False) for link in links)
        if why == "was unheard of":
            links[0]._open = True  # as if Redis were away
        first = await one.claim("", "key", "digest", "first", 1)
        links[0]._open = False
        if why == "ran out":
            with redis_client.Redis.from_url(redis_server.url) as redis:
                assert redis.delete(first.place)
        second = await two.claim("", "key", "digest", "second", 10)
        assert not second.repeated
        await one.release("", first)
        # A retry at the first replica begins nothing beside the second's probe.
        again = await one.claim("", "key", "digest", "third", 10)
        assert (again.identity, again.repeated) == ("second", True)
        await two.release("", second)
        assert not (await one.claim("", "key", "digest", "fourth", 10)).repeated
        for link in links:
            await link.close()

    asyncio.run(run())


def _place(key: str) -> str:
    return f"ironclip:idempotency:{hashlib.sha256(key.encode()).hexdigest()}"


def test_a_page_may_send_the_key_and_read_the_answer(alone: TestClient) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    allowed = alone.options("/attack-probe", headers={**asked, "Access-Control-Request-Headers": "idempotency-key"})
    assert allowed.status_code == 200
    answer = alone.get("/livez", headers={"Origin": "https://app.example"})
    assert "Idempotent-Replayed" in answer.headers["access-control-expose-headers"]


def test_a_key_is_known_to_every_replica(
    start_service: Callable[..., ServiceProcess], tiny_artifact: Path, redis_server: RedisServer
) -> None:
    settings: dict[str, object] = {
        "encoders": f"tiny={tiny_artifact}",
        "redis_url": redis_server.url,
        "redis_mac_key": "s",
        "redis_timeout_ms": 1000,
        "probe_ttl_seconds": 5,
    }
    one, two = start_service(wait=False, **settings), start_service(wait=False, **settings)
    one.wait_ready()
    two.wait_ready()
    with httpx.Client(base_url=one.url, timeout=60) as here, httpx.Client(base_url=two.url, timeout=60) as there:
        first = start(here, "shared", seconds=1)
        assert first.status_code == 202
        again = start(there, "shared", seconds=1)
        assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
        assert again.json()["id"] == first.json()["id"]
        assert start(there, "shared", 2, seconds=1).json()["code"] == "idempotency-key-reused"
        wrong = start(here, "other", label="not there", seconds=1)
        assert wrong.status_code == 422
        assert start(there, "other", seconds=1).status_code == 202
        # A key outlives its probe by far: what was asked for has been done.
        until(lambda: here.get(first.headers["location"]).status_code == 404, 60)
        for replica in (here, there):
            late = start(replica, "shared", seconds=1)
            assert (late.status_code, late.headers["idempotent-replayed"]) == (202, "true")
            assert (late.json()["id"], late.json()["status"]) == (first.json()["id"], "forgotten")
            assert replica.get(late.headers["location"]).json()["code"] == "probe-not-found"
        with redis_client.Redis.from_url(redis_server.url) as redis:
            assert 80_000 < redis.ttl(_place("shared")) <= 86_400

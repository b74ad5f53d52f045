"""Two real service processes over one store: what one is told, the other knows; and Redis may come and go."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import redis

from tests.service.conftest import RedisServer, ServiceProcess, as_base64, metric, picture

LABELS = ["carrot", "rocket"]


def classify(service: ServiceProcess, seed: int, **asked: object) -> httpx.Response:
    body = {"image": as_base64(picture(seed)), "labels": LABELS, **asked}
    body = {key: value for key, value in body.items() if value is not None}
    return httpx.post(f"{service.url}/classify", json=body, timeout=30)


def sees(service: ServiceProcess, labels: list[str] | None) -> bool:
    answer = classify(service, 1, labels=None, label_set="pets")
    if labels is None:
        return answer.status_code == 404
    return answer.status_code == 200 and {row["label"] for row in answer.json()["predictions"]} == set(labels)


def within_a_second(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("store", ["files", "redis"])
def test_a_label_set_put_on_one_replica_is_seen_by_the_other_within_a_second(
    start_service: Callable[..., ServiceProcess],
    tiny_artifact: Path,
    tmp_path: Path,
    store: str,
    request: pytest.FixtureRequest,
) -> None:
    settings: dict[str, object] = {"encoders": f"tiny={tiny_artifact}", "state_dir": tmp_path / "shared"}
    if store == "redis":
        settings["redis_url"] = request.getfixturevalue("redis_server").url
    one, two = start_service(wait=False, **settings), start_service(wait=False, **settings)
    one.wait_ready()
    two.wait_ready()
    assert sees(two, None)
    url = f"{one.url}/label-sets/pets"
    first = httpx.put(url, json={"labels": ["cat", "dog"]}).json()
    assert within_a_second(lambda: sees(two, ["cat", "dog"]))
    httpx.put(url, json={"labels": ["newt"]})
    assert within_a_second(lambda: sees(two, ["newt"]))
    pinned = classify(two, 1, labels=None, label_set=f"pets@{first['digest']}").json()
    assert {row["label"] for row in pinned["predictions"]} == {"cat", "dog"}
    assert httpx.delete(f"{two.url}/label-sets/pets").status_code == 204
    assert within_a_second(lambda: sees(one, None))


def test_replicas_share_the_cache_and_refuse_poison(
    start_service: Callable[..., ServiceProcess], tiny_artifact: Path, redis_server: RedisServer
) -> None:
    settings: dict[str, object] = {"encoders": f"tiny={tiny_artifact}", "redis_url": redis_server.url}
    one, two = start_service(wait=False, **settings), start_service(wait=False, **settings)
    one.wait_ready()
    two.wait_ready()
    client = redis.Redis.from_url(redis_server.url)
    wanted = classify(one, 1)
    assert wanted.headers["cache-status"] == "ironclip; fwd=miss"
    assert within_a_second(lambda: client.dbsize() >= 4)  # image, features, scores, text bank
    shared = classify(two, 1)
    assert shared.headers["cache-status"] == "ironclip; hit"
    assert shared.json() == wanted.json()
    assert metric(two.url, 'ironclip_cache_total{cache="scores",result="shared-hit"}') == 1

    wanted = classify(one, 2).json()
    time.sleep(0.3)
    for key in client.scan_iter("ironclip:cache:*"):
        client.set(key, b"\x80\x04\x95poison")
    poisoned = classify(two, 2)
    assert poisoned.status_code == 200
    assert poisoned.json() == wanted
    assert metric(two.url, 'ironclip_cache_total{cache="images",result="rejected"}') >= 1


def test_redis_away_at_the_start_lost_and_slow_on_the_way(
    start_service: Callable[..., ServiceProcess], tiny_artifact: Path
) -> None:
    server = RedisServer()
    service = start_service(encoders=f"tiny={tiny_artifact}", redis_url=server.url)

    def up(value: float) -> bool:
        return metric(service.url, "ironclip_redis_up") == value

    try:
        assert classify(service, 1).status_code == 200
        assert up(0)
        server.start()
        deadline = time.monotonic() + 10
        while not up(1) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert up(1)
        assert classify(service, 2).status_code == 200

        server.send(signal.SIGSTOP)
        start = time.perf_counter()
        answers = [classify(service, seed) for seed in range(10, 20)]
        assert {answer.status_code for answer in answers} == {200}
        assert time.perf_counter() - start < 5
        assert up(0)
        assert metric(service.url, 'ironclip_redis_errors_total{reason="timeout"}') >= 3
        assert metric(service.url, 'ironclip_cache_total{cache="images",result="unavailable"}') >= 1
        server.send(signal.SIGCONT)
        deadline = time.monotonic() + 15
        while not up(1) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert up(1)

        server.kill()
        assert {classify(service, seed).status_code for seed in range(30, 36)} == {200}
        assert up(0)
        assert classify(service, 1).headers["cache-status"] == "ironclip; hit"
        assert httpx.get(f"{service.url}/readyz").status_code == 200
    finally:
        server.kill()

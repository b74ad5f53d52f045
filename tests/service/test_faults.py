"""Two replicas and a Redis under load, while things break: no wrong answer, nothing lost but what cannot be saved.

The tests are one story: they run in order, and the last ones leave nothing running.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.service.conftest import RedisServer, ServiceProcess, as_base64, launch_service, metric, picture, until
from tests.service.proxies import Proxy, proxy

LABELS = ["cat", "dog", "ship"]
SEEDS = itertools.count(1000)


@dataclass
class World:
    """Two replicas that share a Redis, which they reach through a proxy."""

    one: ServiceProcess
    two: ServiceProcess
    server: RedisServer
    line: Proxy


@pytest.fixture(scope="module")
def world(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = RedisServer()
    server.start()
    with proxy(server.port) as line:
        settings: dict[str, object] = {
            "encoders": f"tiny={tiny_artifact}",
            "redis_url": f"redis://127.0.0.1:{line.port}/0",
            "max_queue_ms": 150,
            "drain_delay_seconds": 4,
        }
        folder = tmp_path_factory.mktemp("world")
        one, two = launch_service(folder, **settings), launch_service(folder, **settings)
        try:
            one.wait_ready()
            two.wait_ready()
            yield World(one, two, server, line)
        finally:
            one.stop()
            two.stop()
            server.kill()


@dataclass
class Load:
    """Clients that ask without a pause; each picture goes to both replicas, and their answers are compared."""

    urls: tuple[str, str]
    clients: int = 3
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stopping.is_set():
                form = {"image": as_base64(picture(next(SEEDS))), "labels": LABELS}
                answers = [client.post(f"{url}/classify", json=form) for url in self.urls]
                self.statuses.update(answer.status_code for answer in answers)
                first, second = (answer.json().get("predictions") for answer in answers)
                if not (first and second and same(first, second)):
                    self.faults.append(f"{answers[0].text[:500]}\n{answers[1].text[:500]}")


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    """Whether two lists of predictions agree, to what the size of a batch may change."""
    scores = {row["label"]: row["score"] for row in two}
    return all(math.isclose(row["score"], scores[row["label"]], abs_tol=1e-4) for row in one)


def up(world: World, value: float) -> Callable[[], bool]:
    return lambda: {metric(one.url, "ironclip_redis_up") for one in (world.one, world.two)} == {value}


def test_whatever_happens_to_redis_answers_stay_right(world: World) -> None:
    server = world.server
    with Load((world.one.url, world.two.url)) as load:
        client = redis.Redis.from_url(server.url)
        until(lambda: client.dbsize() > 20)

        # Poisoned between one's writing and two's reading: garbage, values of other keys, things of another type.
        forms = [{"image": as_base64(picture(seed)), "labels": LABELS} for seed in range(12)]
        wanted = [httpx.post(f"{world.one.url}/classify", json=form).json()["predictions"] for form in forms]
        time.sleep(0.3)
        names = sorted(client.scan_iter("ironclip:cache:*"))
        values = client.mget(names)
        for i, name in enumerate(names):
            if i % 3 == 2:
                client.delete(name)
                client.rpush(name, b"x")
            else:
                client.set(name, b"\x80\x04\x95poison" if i % 3 else values[i - 1] or b"")
        found = [httpx.post(f"{world.two.url}/classify", json=form).json()["predictions"] for form in forms]
        assert all(same(one, two) for one, two in zip(wanted, found, strict=True))
        assert metric(world.two.url, 'ironclip_cache_total{cache="images",result="rejected"}') > 0

        # Full: it takes no more.
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        refused = 'ironclip_redis_errors_total{reason="refused"}'
        until(lambda: metric(world.one.url, refused) > 0)
        client.config_set("maxmemory", "0")

        # Slow: each answer takes longer than is waited for.
        world.line.delay = 0.3
        until(up(world, 0))
        world.line.delay = 0
        until(up(world, 1))

        # Paused, and gone.
        server.send(signal.SIGSTOP)
        until(up(world, 0))
        server.send(signal.SIGCONT)
        until(up(world, 1))
        server.kill()
        until(up(world, 0))
        server.start()
        until(up(world, 1))
        shared = 'ironclip_cache_total{cache="scores",result="shared-hit"}'
        before = metric(world.two.url, shared)
        until(lambda: metric(world.two.url, shared) > before)  # and all is as before
    assert set(load.statuses) == {200}
    assert not load.faults
    assert load.statuses[200] > 50


def test_more_than_can_be_done_is_refused_and_the_rest_is_done_in_time(world: World) -> None:
    url = world.two.url

    def ask(number: int) -> tuple[httpx.Response, float]:
        count = 1 if number % 2 else 48
        images = [as_base64(picture(next(SEEDS))) for _ in range(count)]
        began = time.perf_counter()
        form = {"images": images, "labels": LABELS, "defence": {"name": "cola", "views": 16}}
        answer = httpx.post(f"{url}/classify", json=form, timeout=60)
        return answer, time.perf_counter() - began

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(72)))
    statuses = Counter(answer.status_code for answer, _ in answers)
    assert set(statuses) == {200, 429}, statuses
    for answer, _ in answers:
        if answer.status_code == 200:
            assert all("predictions" in item for item in answer.json())
        else:
            body = answer.json()
            assert body["limit_name"] in ("queue-ms", "queue-items")
            assert "IRONCLIP_MAX_QUEUE" in body["detail"]
            assert body["limit"] > 0
            assert int(answer.headers["retry-after"]) >= body["retry_after_ms"] / 1000
    assert (
        metric(url, 'ironclip_refused_total{limit="queue-ms"}')
        + metric(url, 'ironclip_refused_total{limit="queue-items"}')
        == statuses[429]
    )
    until(lambda: metric(url, 'ironclip_queue_seconds_estimate{encoder="tiny",tower="image"}') == 0)
    again, _ = ask(1)
    assert again.status_code == 200


def test_a_replica_that_is_killed_takes_with_it_what_it_had_in_hand_and_no_more(world: World) -> None:
    clients, failures, answered = 6, Counter[str](), Counter[str]()
    stopping = threading.Event()

    def run(url: str) -> None:
        while not stopping.is_set():
            form = {"image": as_base64(picture(next(SEEDS))), "labels": LABELS}
            when = "after" if killed.is_set() else "before"
            try:
                answer = httpx.post(f"{url}/classify", json=form, timeout=30)  # a connection each
                answered[f"{when} {answer.status_code}"] += 1
            except httpx.TransportError:
                failures[when] += 1

    killed = threading.Event()
    with proxy(world.one.port, world.two.port) as balancer, ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(run, f"http://127.0.0.1:{balancer.port}")
        until(lambda: answered["before 200"] > 20)
        world.one.process.kill()
        world.one.process.wait()
        killed.set()
        until(lambda: answered["after 200"] > 40)
        stopping.set()
    assert failures["before"] <= clients  # at most one in hand of each client
    assert failures["after"] == 0
    assert {key.split()[1] for key in answered} == {"200"}


def test_a_stop_under_load_loses_nothing(world: World) -> None:
    """Clients go on as a balancer sends them: until `/readyz` has said no, which it does before the port closes."""
    service, outcomes = world.two, Counter[str]()
    asked, gone = threading.Event(), threading.Event()

    def run() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not gone.is_set():
                form = {"images": [as_base64(picture(next(SEEDS))) for _ in range(4)], "labels": LABELS}
                try:
                    outcomes[str(client.post("/classify", json=form).status_code)] += 1
                except httpx.TransportError as error:
                    outcomes[f"lost: {error!r}"] += 1
                if outcomes["200"] > 10:
                    asked.set()

    before = Path(service.log).read_text().count('"op":"classify"')
    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert asked.wait(30)
    service.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)
    during = sum(outcomes.values())
    until(lambda: sum(outcomes.values()) > during + 6)  # it answers on while it says no
    gone.set()
    for thread in threads:
        thread.join(60)
    assert service.process.wait(30) == 0
    assert set(outcomes) <= {"200", "429"}, outcomes
    log = service.log.read_text()
    assert log.count('"op":"classify"') - before == sum(outcomes.values())  # whoever was taken in was answered
    assert "Traceback" not in log

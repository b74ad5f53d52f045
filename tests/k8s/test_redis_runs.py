"""The internal Redis as the chart configures it, run for real, with the service in the environment that is rendered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from service.keys import Caller
from service.label_sets import LabelLimits, LabelSets
from service.label_stores import Expect, RedisStore
from service.rate_limits import Limiter
from service.redis_link import RedisLink
from tests.k8s.conftest import Chart, Manifest, only
from tests.k8s.test_service_pod import AWAITED, environment
from tests.service.conftest import free_port, launch_service, metric, picture

pytestmark = pytest.mark.usefixtures("redis_installed")


@dataclass
class Running:
    """A Redis that was started by the chart's own script."""

    manifests: list[Manifest]
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return environment(self.manifests)["IRONCLIP_REDIS_URL"].replace("@rel-ironclip-redis:", "@127.0.0.1:")

    @property
    def password(self) -> str:
        return urlsplit(self.url).password or ""

    def client(self) -> Redis:
        return Redis.from_url(self.url)

    def ping(self, password: str) -> int:
        """Status of the probe's script."""
        command = ["sh", str(self.folder / "ping.sh")]
        return subprocess.run(command, env={**os.environ, "REDIS_PASSWORD": password}, timeout=20).returncode


@pytest.fixture(scope="module")
def running(chart: Chart, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    values = {
        "redis.mode": "internal",
        "redis.port": port,
        "redis.internal.maxmemory": "8mb",
        "encoders": [{"name": "tiny", "spec": str(tiny_artifact)}],
        "drain.delaySeconds": 0,
        "metrics.port": 0,
    }
    manifests = chart.render(values)
    redis = Running(manifests, folder, port)
    (folder / "data").mkdir()
    for name, text in only(manifests, "ConfigMap", "-redis")["data"].items():
        assert "bind * -::*" in text or name != "redis.conf"
        local = text.replace("/etc/redis/", f"{folder}/").replace("dir /data", f"dir {folder}/data")
        (folder / name).write_text(local.replace("bind * -::*", "bind 127.0.0.1"), encoding="utf-8")
    # The container's own command, but for the folder.
    (container,) = only(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    command = [part.replace("/etc/redis/", f"{folder}/") for part in container["command"]]
    with (folder / "log").open("wb") as log:
        environ = {**os.environ, "REDIS_PASSWORD": redis.password}
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(RedisError):
                if redis.client().ping():
                    break
            time.sleep(0.05)
        else:
            pytest.fail((folder / "log").read_text())
        yield redis
    finally:
        process.kill()
        process.wait()


def test_only_who_knows_the_password_gets_in(running: Running) -> None:
    assert len(running.password) >= 32
    with pytest.raises(AuthenticationError):
        Redis(port=running.port, username="ironclip", password="x" * 40).ping()
    with pytest.raises((AuthenticationError, NoPermissionError)):
        Redis(port=running.port).get("ironclip:x")
    # The process list shows neither the password nor its hash.
    assert running.password not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
    assert running.ping(running.password) == 0
    assert running.ping("wrong") != 0


def test_the_user_can_do_nothing_to_the_server_or_to_others_keys(running: Running) -> None:
    client = running.client()
    for command in (["CONFIG", "GET", "*"], ["FLUSHALL"], ["KEYS", "*"], ["ACL", "LIST"], ["MONITOR"], ["SHUTDOWN"]):
        with pytest.raises(NoPermissionError):
            client.execute_command(*command)
    with pytest.raises(NoPermissionError):
        client.set("other:key", b"1")
    assert client.set("ironclip:mine", b"1", px=1000)


def test_a_full_redis_drops_vectors_and_never_label_sets(running: Running) -> None:
    client = running.client()
    client.hset("ironclip:label-set:kept", mapping={"current": "abc"})
    for start in range(0, 16_000, 1000):
        pipe = client.pipeline(transaction=False)
        for number in range(start, start + 1000):
            pipe.set(f"ironclip:v:{number}", os.urandom(1000), px=3_600_000)
        pipe.execute()
    assert client.hget("ironclip:label-set:kept", "current") == b"abc"
    left = sum(client.exists(f"ironclip:v:{number}") for number in range(0, 16_000, 100))
    assert 0 < left < 160


def test_the_service_runs_in_the_rendered_environment(running: Running, tmp_path: Path) -> None:
    """All that it does to Redis is allowed to the user: label sets with their transactions, caches, probes."""
    variables = {
        name.removeprefix("IRONCLIP_").lower(): value
        for name, value in environment(running.manifests).items()
        if name.startswith("IRONCLIP_")
    }
    for name in ("host", "port", "state_dir", *AWAITED):
        variables.pop(name, None)
    # One thread: the tests share few cores.
    here = {"redis_url": running.url, "redis_timeout_ms": 2000, "threads": 1}
    service = launch_service(tmp_path, **{**variables, **here})
    try:
        service.wait_ready()
        with httpx.Client(base_url=service.url, timeout=60) as client:
            answer = client.put("/label-sets/fruit", json={"labels": ["apple", "pear"]})
            assert answer.status_code == 201, answer.text
            headers = {"Content-Type": "image/png"}
            for _ in range(2):
                answer = client.post("/classify?label_set=fruit", content=picture(3), headers=headers)
                assert answer.status_code == 200, answer.text
            assert "fruit" in client.get("/label-sets").text
            options = {"label_set": "fruit", "attack": "fgsm", "max_eps": "1"}
            probe = client.post("/attack-probe", files={"image": picture(3)}, data=options)
            assert probe.status_code == 200, probe.text
            deadline = time.monotonic() + 20
            while not running.client().exists("ironclip:label-sets") and time.monotonic() < deadline:
                time.sleep(0.1)
            assert running.client().smembers("ironclip:label-sets") == {b"fruit"}
            assert client.delete("/label-sets/fruit").status_code == 204
        assert metric(service.url, "ironclip_redis_up") == 1
        for reason in ("refused", "error"):
            assert metric(service.url, f'ironclip_redis_errors_total{{reason="{reason}"}}') == 0
    finally:
        assert service.stop() == 0


def test_the_service_may_do_there_what_it_has_to(running: Running) -> None:
    """Rate limits are a script that asks the server's clock: what a script may do is its user's to be allowed."""

    async def take() -> list[str]:
        link = RedisLink(running.url, 2.0)
        await link.start()
        limiter = Limiter(link, "ironclip")
        caller = Caller("acme", "key1", frozenset({"infer"}), points_per_minute=60, burst=10)
        taken = [await limiter.take(caller, 2), await limiter.take(caller, 0)]
        assert taken[1].left == pytest.approx(8, abs=1)
        sets = LabelSets(RedisStore(link, "ironclip"), {}, LabelLimits())
        await sets.put("pets", {"labels": ["cat"]}, Expect())
        await sets.put("pets", {"labels": ["dog"]}, Expect())
        await sets.delete("pets", Expect())
        await link.close()
        return [one.store for one in taken]

    assert asyncio.run(take()) == ["redis", "redis"]

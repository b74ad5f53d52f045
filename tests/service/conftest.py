"""Fixtures of the service's tests: hostile pictures, Redis as a process of its own, and the service as one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from PIL import Image

from tests import needs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def picture(seed: int, form: str = "PNG") -> bytes:
    """A small picture of its own for each seed, as a file."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


def as_base64(data: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(data).decode()


def metric(url: str, name: str) -> float:
    """The value of one series, named with its labels; 0 where there is none."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


@dataclass
class RedisServer:
    """A redis-server of our own, which tests may kill, pause and start again."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        needs.redis_installed()
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2) as sock:
                sock.sendall(b"PING\r\n")
                if sock.recv(16).startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A running Redis; nothing in it."""
    server = RedisServer()
    server.start()
    yield server
    server.kill()


@dataclass
class ServiceProcess:
    """One `python -m service`."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the service did not get ready:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def service_environment(**settings: object) -> dict[str, str]:
    """This process's environment with nothing of ours in it but the given settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IRONCLIP_")}
    return environment | {f"IRONCLIP_{name.upper()}": str(value) for name, value in settings.items()}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


def launch_service(folder: Path, *, module: str = "service", **settings: object) -> ServiceProcess:
    """Start a service, or a module that is one with faults, that keeps its log and its state in the folder."""
    port = free_port()
    log = folder / f"service-{port}.log"
    defaults = {"port": port, "dtype": "float32", "threads": 1, "state_dir": folder / "state"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=service_environment(**{**defaults, **settings}),
            stdout=file,
            stderr=file,
        )
    return ServiceProcess(port, process, log)


@contextlib.contextmanager
def served(folder: Path, **settings: object) -> Iterator[ServiceProcess]:
    """A service that is ready, as `launch_service` starts it; stopped at the end of the block."""
    service = launch_service(folder, **settings)  # type: ignore[arg-type]
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Start services with the given settings; they are stopped at the end of the test."""
    started: list[ServiceProcess] = []

    def start(*, wait: bool = True, **settings: object) -> ServiceProcess:
        service = launch_service(tmp_path, **settings)
        started.append(service)
        if wait:
            service.wait_ready()
        return service

    yield start
    for service in started:
        service.stop()


@pytest.fixture(scope="session")
def tiny_service(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service with a tiny encoder, for all tests that change nothing in it but label sets of their own."""
    folder = tmp_path_factory.mktemp("service")
    with served(folder, encoders=f"tiny={tiny_artifact}", request_timeout_ms=10_000) as service:
        yield service


@pytest.fixture(scope="session")
def client(tiny_service: ServiceProcess) -> Iterator[httpx.Client]:
    """An HTTP client of `tiny_service`."""
    with httpx.Client(base_url=tiny_service.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """The module that makes hostile and rare pictures (`malformed.py`)."""
    spec = importlib.util.spec_from_file_location("malformed", Path(__file__).with_name("malformed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def malformed_images(corpus: ModuleType) -> dict[str, bytes]:
    """Pictures that must be refused, by name; the name's part before the slash is the error's code."""
    images: dict[str, bytes] = corpus.refused()
    return images


@pytest.fixture(scope="session")
def odd_images(corpus: ModuleType) -> dict[str, bytes]:
    """Pictures that look hostile or rare and must be decoded, by name."""
    images: dict[str, bytes] = corpus.odd()
    return images


@dataclass
class Locked:
    """A service with API keys, a Redis and signatures, and a port of its own for the metrics."""

    service: ServiceProcess
    redis: RedisServer
    keys_file: Path
    metrics_url: str
    mac_key: str
    keys: dict[str, str]

    @property
    def url(self) -> str:
        return self.service.url

    def client(self, name: str) -> httpx.Client:
        """An HTTP client with the key of this name; "" has none."""
        headers = {"Authorization": f"Bearer {self.keys[name]}"} if name else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


def make_key(identity: str, tenant: str, *scopes: str, **fields: object) -> tuple[str, str]:
    """An API key, and its entry for the keys file."""
    secret = secrets.token_hex(32)
    values = {"id": identity, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "tenant": tenant}
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**values, "scopes": scopes, **fields}.items()]
    return f"ick_{identity}_{secret}", "[[keys]]\n" + "\n".join(lines) + "\n"


def write_keys(path: Path, made: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Write a keys file; name -> key."""
    path.write_text("\n".join(entry for _, entry in made.values()), encoding="utf-8")
    return {name: key for name, (key, _) in made.items()}


@pytest.fixture(scope="session")
def locked(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """One locked service for all tests that leave its keys and its Redis as they found them."""
    folder = tmp_path_factory.mktemp("locked")
    made = {
        "acme": make_key("acme1", "acme", "infer", "probe"),
        "acme-2": make_key("acme2", "acme", "infer", "probe"),
        "beta": make_key("beta1", "beta", "infer", "probe"),
        "open": make_key("open1", "", "infer", "probe"),
        "prober": make_key("prober1", "acme", "probe"),
        "watcher": make_key("watcher1", "", "metrics"),
        "expired": make_key("expired1", "acme", "infer", expires="2020-01-01T00:00:00Z"),
        "slow": make_key("slow1", "slow", "infer", points_per_minute=1, burst=20),
        "quick": make_key("quick1", "quick", "infer", points_per_minute=600, burst=5),
        "modest": make_key("modest1", "modest", "infer", "probe", points_per_minute=6000, burst=20),
        "paying": make_key("paying1", "paying", "infer", "probe", points_per_minute=1, burst=100_000),
        "fuzzing": make_key("fuzzing1", "fuzzing", "infer", "probe", points_per_minute=1, burst=100_000),
        "other-paying": make_key("paying2", "paying-2", "infer", "probe", points_per_minute=1, burst=100_000),
    }
    keys = write_keys(folder / "keys.toml", made)
    redis, metrics_port, mac_key = RedisServer(), free_port(), "0123456789abcdef" * 4
    redis.start()
    service = launch_service(
        folder,
        encoders=f"tiny={tiny_artifact}",
        redis_url=redis.url,
        redis_mac_key=mac_key,
        redis_timeout_ms=500,
        keys_file=folder / "keys.toml",
        metrics_port=metrics_port,
        cors_origins="https://app.example",
    )
    try:
        service.wait_ready()
        yield Locked(service, redis, folder / "keys.toml", f"http://127.0.0.1:{metrics_port}", mac_key, keys)
    finally:
        service.stop()
        redis.kill()

"""Several real processes behind one port: who is ready answers, who ends is started again, signals reach all."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.__main__ import main
from service.environment import process_environment
from service.fleet import plan, read_devices
from service.settings import Settings, SettingsInvalid
from tests.service.conftest import ROOT, as_base64, free_port, metric, picture, service_environment


@dataclass
class Running:
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"^fleet: .*: process (\d+)$", self.log.read_text(), re.MULTILINE)]

    def url(self, number: int = 0) -> str:
        """Of the shared port, or of one process."""
        return f"http://127.0.0.1:{self.port + number}"

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Where nobody waits for orphans they stay in the table.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def ports(count: int) -> int:
    """A free port that has free ones above it."""
    for _ in range(50):
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports in a row")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*arguments: str, **settings: object) -> Running:
        port, log = ports(3), tmp_path / f"fleet-{len(started)}.log"
        environment = service_environment(**{"port": port, "dtype": "float32", "state_dir": tmp_path, **settings})
        with log.open("wb") as file:
            command = [sys.executable, "-m", "service", "fleet", *arguments]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        started.append(Running(port, process, log))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(60)
            one.process.kill()
        for pid in one.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_two_processes_answer_on_one_port_and_each_may_go(launch: Callable[..., Running], tiny_artifact: Path) -> None:
    fleet = launch("--devices", "cpu,cpu", encoders=f"tiny={tiny_artifact}", drain_delay_seconds=1)
    fleet.until(lambda: ready(fleet.url(1)) and ready(fleet.url(2)))
    fleet.until(lambda: ready(fleet.url()))
    statuses: list[int] = []

    def ask(count: int = 1) -> None:
        for _ in range(count):
            body = {"image": as_base64(picture(len(statuses))), "labels": ["carrot", "rocket"]}
            for tries in (1, 0):
                try:
                    answer = httpx.post(f"{fleet.url()}/classify", json=body, timeout=30)
                    break
                except httpx.TransportError:  # it was in the queue of a listener that has just closed
                    assert tries
            statuses.append(answer.status_code)

    def served(number: int) -> float:
        return metric(fleet.url(number), 'ironclip_requests_total{code="200",op="classify"}')

    fleet.until(lambda: ask() or (served(1) > 0 and served(2) > 0), 30)  # type: ignore[func-returns-value]
    first, second = fleet.pids()
    # Killed: the other answers on, and it comes back.
    os.kill(first, signal.SIGKILL)
    ask(5)
    fleet.until(lambda: len(fleet.pids()) == 3 and ready(fleet.url(1)))
    # Drained by hand: it leaves the shared port at once, while its own still answers.
    os.kill(second, signal.SIGTERM)
    fleet.until(lambda: not ready(fleet.url(2)), 5)
    ask(10)
    fleet.until(lambda: len(fleet.pids()) == 4)
    assert set(statuses) == {200}
    fleet.process.send_signal(signal.SIGTERM)
    assert fleet.process.wait(60) == 0
    assert all(gone(pid) for pid in fleet.pids())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the children of a killed process")
def test_nothing_is_left_when_the_fleet_is_killed(launch: Callable[..., Running], tiny_artifact: Path) -> None:
    fleet = launch("--devices", "cpu,cpu", encoders=f"tiny={tiny_artifact}")
    fleet.until(lambda: len(fleet.pids()) == 2)
    fleet.process.kill()
    fleet.until(lambda: all(gone(pid) for pid in fleet.pids()), 60)


def test_what_cannot_start_ends_the_fleet(launch: Callable[..., Running]) -> None:
    fleet = launch("--devices", "cpu", encoders="none=/no/such/folder")
    assert fleet.process.wait(120) == 3
    assert "cannot be loaded" in fleet.log.read_text()


def test_what_cannot_be_meant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "--devices", "gpu0"]) == 2
    assert "cuda:0,cuda:1" in capsys.readouterr().err
    assert main(["fleet", "--devices", "cpu", "--port", "65535"]) == 2
    assert "IRONCLIP_PORT" in capsys.readouterr().err


def test_each_process_has_its_own_ports_cores_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.fleet.usable_cpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc")
    settings = Settings(port=9000, metrics_port=9100, decode_workers=3)
    members = plan(read_devices("cuda:0, cuda:1"), settings, {"host": "0.0.0.0"})
    found = [
        {name.removeprefix("IRONCLIP_").lower(): value for name, value in member.environment.items()}
        for member in members
    ]
    wanted = {"host": "0.0.0.0", "device": "cuda", "shared_port": "9000", "threads": "4", "decode_workers": "3"}
    for number, environment in enumerate(found):
        assert wanted.items() <= environment.items()
        assert environment["port"] == str(9001 + number)
        assert environment["metrics_port"] == str(9100 + number)
    assert [environment["cuda_visible_devices"] for environment in found] == ["4", "GPU-abc"]
    with pytest.raises(SettingsInvalid, match="CUDA_VISIBLE_DEVICES"):
        process_environment("cuda:2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert process_environment("cuda:2")["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(SettingsInvalid, match="METRICS_PORT"):
        plan(["cpu", "cpu"], Settings(port=9000, metrics_port=9002), {})
    with pytest.raises(ValueError, match="shared_port"):
        Settings(port=9000, shared_port=9000)

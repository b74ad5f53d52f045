"""The service's container under docker/image_test.py: started hardened, asked, looked at, and stopped at work."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from engine import Engine, EngineError

ROOT = Path(__file__).resolve().parent.parent
USER = 10001
HARDENED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges")
TMP = "--tmpfs=/tmp:rw,size=256m,mode=1777,nosuid,nodev,noexec"
VOLUMES = ("/var/lib/ironclip", "/var/cache/ironclip", "/artifacts")
DRAIN_SECONDS = 30
HEALTH = ("/opt/venv/bin/python", "-I", "/app/healthcheck.py")
_PYTHON = "/opt/venv/bin/python"


class Service:
    """One container of the service, hardened as compose.yaml has it."""

    def __init__(self, engine: Engine, tag: str, *options: str) -> None:
        self.engine = engine
        self.name = f"ironclip-test-{uuid.uuid4().hex[:8]}"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        network = [f"--env=IRONCLIP_PORT={self.port}", "--env=IRONCLIP_HOST=127.0.0.1"]
        if not engine.host_network:
            network = [f"--publish=127.0.0.1:{self.port}:8000"]
        self.started = time.monotonic()
        engine.run(
            "run", "--detach", f"--name={self.name}", *engine.run_options(), *HARDENED, TMP, *network,
            f"--env=IRONCLIP_DRAIN_SECONDS={DRAIN_SECONDS}", *options, tag,
        )  # fmt: skip

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
        """One request; returns its status and its JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        data = answer.read()
        kind = answer.headers.get_content_type()
        return answer.status, json.loads(data) if kind.endswith("json") else data.decode()

    def wait_ready(self, seconds: float = 300) -> float:
        """Wait until /readyz says yes; returns the seconds since the container was started."""
        while time.monotonic() - self.started < seconds:
            try:
                if self.ask("GET", "/readyz", timeout=2)[0] == 200:
                    return time.monotonic() - self.started
            except (OSError, http.client.HTTPException):
                pass
            if not self.state()["Running"]:
                break
            time.sleep(0.1)
        raise EngineError(f"the container did not get ready:\n{self.logs()}")

    def state(self) -> dict[str, Any]:
        """The engine's word on the container: Running, ExitCode and more."""
        (found,) = json.loads(self.engine.run("container", "inspect", self.name))
        return dict(found["State"])

    def python(self, code: str, check: bool = True) -> str:
        """Run Python in the container, as its user."""
        return self.engine.run("exec", self.name, _PYTHON, "-c", code, check=check)

    def logs(self) -> str:
        """All that the service wrote."""
        return self.engine.run("logs", self.name, check=False)

    def remove(self) -> None:
        """Kill and forget the container."""
        self.engine.run("rm", "--force", "--volumes", self.name, check=False)


def check_running(container: Service, cpus: int) -> int:
    """A classification, the health check, and what the process may; returns its resident memory in MiB."""
    sample = ROOT / "ironclip/demo/samples/carrot.png"
    status, answer = container.ask("POST", "/classify", _request(sample.read_bytes(), ["rocket", "carrot", "bicycle"]))
    assert status == 200, answer
    assert answer["predictions"][0]["label"] == "carrot", answer
    container.engine.run("exec", container.name, *HEALTH)
    asleep = container.engine.run("exec", "--env=IRONCLIP_PORT=1", container.name, *HEALTH, check=False)
    assert "refused" in asleep, asleep

    process = dict(line.split(":", 1) for line in container.python("print(open('/proc/1/status').read())").splitlines())
    assert set(process["Uid"].split()) == {str(USER)}, process["Uid"]
    assert set(process["Gid"].split()) == {str(USER)}, process["Gid"]
    assert {int(process[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Bnd", "Inh", "Amb")} == {0}
    assert process["NoNewPrivs"].strip() == "1"
    for path in ("/", "/app", "/opt/venv", "/etc", "/home"):
        said = container.python(f"open('{path}/written', 'w')", check=False)
        assert "Read-only file system" in said or "Permission denied" in said, f"{path}: {said}"
    container.python("open('/tmp/written', 'w').write('1')")

    status, models = container.ask("GET", "/models")
    assert status == 200
    threads = {model["dtype_report"]["threads"] for model in models["models"]}
    assert threads == {min(cpus, len(os.sched_getaffinity(0)))}, f"{threads} threads under a quota of {cpus} CPUs"
    return int(process["VmRSS"].split()[0]) // 1024


def check_volumes(engine: Engine, tag: str) -> None:
    """A label set that was registered outlives the container, on a volume that began empty."""
    volume = f"ironclip-test-{uuid.uuid4().hex[:8]}"
    option = f"--volume={volume}:/var/lib/ironclip"
    try:
        for attempt in range(2):
            container = Service(engine, tag, option)
            try:
                container.wait_ready()
                if attempt == 0:
                    status, answer = container.ask("PUT", "/label-sets/kept", {"labels": ["carrot", "rocket"]})
                    assert status in (200, 201), answer
                status, answer = container.ask("GET", "/label-sets/kept")
                assert status == 200, answer
            finally:
                container.remove()
    finally:
        engine.run("volume", "rm", "--force", volume, check=False)


def check_drain(container: Service) -> float:
    """SIGTERM to process 1 with a request in flight: it is answered, then the process ends with status 0.

    Returns the seconds from the signal to the end.
    """
    answers: list[tuple[int, Any]] = []
    texts = [f"an emoji of thing number {number}, drawn by hand" for number in range(1024)]
    asking = threading.Thread(target=lambda: answers.append(container.ask("POST", "/embed", {"texts": texts})))
    asking.start()
    deadline = time.monotonic() + 20
    while "ironclip_requests_in_flight 2.0" not in container.ask("GET", "/metrics")[1]:
        assert asking.is_alive(), f"the request was answered before it could be seen: {str(answers)[:300]}"
        assert time.monotonic() < deadline
    start = time.monotonic()
    container.engine.run("kill", "--signal=TERM", container.name)
    container.engine.run("wait", container.name, timeout=DRAIN_SECONDS + 20)
    seconds = time.monotonic() - start
    asking.join(30)
    assert len(answers) == 1, container.logs()
    assert answers[0][0] == 200, answers
    assert container.state()["ExitCode"] == 0, container.logs()
    assert seconds < DRAIN_SECONDS, "nothing was left to do, and it waited"
    assert "Traceback" not in container.logs(), container.logs()
    return seconds


def _request(data: bytes, labels: list[str]) -> dict[str, Any]:
    return {"image": base64.b64encode(data).decode(), "labels": labels}

"""`make compose-test`: `docker compose up` as the README has it, with a real engine, and what it promises.

Needs a Docker engine with Compose, and the images; it builds nothing. The stack comes up healthy, classifies, shares
Redis, goes on without it, drains, keeps its label sets, is scraped by Prometheus where its image is given, and asks for
API keys with docker/compose.keys.yaml beside it. What was measured goes to docker/results.json. The project is one of
the test's own, and is removed with its volumes at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import RESULTS, ROOT, git, modified, read_results, write_results

_SAMPLES = ROOT / "ironclip" / "demo" / "samples"
KEYS_FILES = ("compose.yaml", "docker/compose.keys.yaml")
# Runs in the service's container: what is not published can be asked there alone.
_METRICS = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9000/metrics', timeout=10).read().decode())"
_NEW_KEY = ("keys", "new", "--tenant", "acme", "--scopes", "infer")
# Of the caller's environment: what Docker's client needs, and none of what compose.yaml reads.
_KEPT = re.compile(r"PATH|HOME|XDG_\w+|DOCKER_\w+")
# A proxy is for other machines.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(Exception):
    """A command failed, or a promise was not kept."""


class Stack:
    """The containers of this repository's compose.yaml.

    Args:
        variables: of Compose.
        files: those that Compose is given; none: the one that it finds.
    """

    def __init__(self, variables: Mapping[str, str], files: Sequence[str] = ()) -> None:
        self.port, self.prometheus_port = _free_port(), _free_port()
        ports = {"HOST_PORT": str(self.port), "PROMETHEUS_PORT": str(self.prometheus_port)}
        kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
        self._environment = {**kept, **variables, **ports}
        self._project = f"ironclip-test-{os.getpid()}"
        chosen = [f"--file={file}" for file in files]
        self._command = [*_compose(), f"--env-file={os.devnull}", f"--project-name={self._project}", *chosen]

    def __call__(self, *arguments: str, seconds: float = 300, check: bool = True) -> str:
        """Run one command of Compose; returns what it printed.

        Raises:
            Failed: its status is not 0, and `check` is set.
        """
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        if check and done.returncode:
            raise Failed(f"docker compose {' '.join(arguments)}: status {done.returncode}\n{done.stdout}")
        return done.stdout

    def up(self, *services: str, profile: str = "") -> float:
        """Start what is not there, all or these; returns the seconds until all of it is healthy."""
        began = time.monotonic()
        chosen = [f"--profile={profile}"] if profile else []
        self(*chosen, "up", "--detach", "--no-build", "--pull=never", "--wait", *services)
        return time.monotonic() - began

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        """One request: a picture as bytes, or JSON; returns status, answer and headers."""
        kind = "image/png" if isinstance(body, bytes) else "application/json"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        for name, value in {"Content-Type": kind, **headers}.items():
            asked.add_header(name.replace("_", "-"), value)
        try:
            with _OPENER.open(asked, timeout=60) as answer:
                text, status, told = answer.read(), answer.status, answer.headers
        except urllib.error.HTTPError as error:
            text, status, told = error.read(), error.code, error.headers
        return status, json.loads(text) if "json" in told.get("Content-Type", "") else text.decode(), told

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        told = self("exec", "-T", "ironclip", "/opt/venv/bin/python", "-I", "-c", _METRICS)
        found = re.search(rf"^{name} (\S+)$", told, re.MULTILINE)
        if found is None:
            raise Failed(f"/metrics has no {name}")
        return float(found[1])

    def container(self, service: str) -> str:
        """The name of a service's container."""
        return self("ps", "--all", "--format={{.Name}}", service).strip()

    def remove(self) -> None:
        """Take everything away, volumes too; what cannot be is told, not raised: something else may be."""
        try:
            self("--profile=observe", "down", "--volumes")
        except (Failed, subprocess.TimeoutExpired) as error:
            print(f"compose-test: the project {self._project} could not be removed: {error}", file=sys.stderr)

    def show(self) -> None:
        """Print the ends of the logs: what is removed next cannot be looked at."""
        print(self("--profile=observe", "logs", "--no-color", "--tail=20", check=False), file=sys.stderr)


def check_stack(stack: Stack) -> dict[str, float]:
    """Everything but keys; returns what was measured."""
    measured = {"seconds_until_healthy": round(stack.up(), 1)}
    guitar, octopus = ((_SAMPLES / f"{name}.png").read_bytes() for name in ("guitar", "octopus"))
    status, answer, _ = stack.ask("POST", "/classify?label_set=emoji&top_k=1", guitar)
    _hold(status == 200 and answer["predictions"][0]["label"] == "guitar", "a guitar is a guitar", answer)
    _hold(stack.metric("ironclip_redis_up") == 1, "the service uses Redis", stack("logs", "ironclip"))
    _hold(_stored(stack), "a label set is registered")
    _hold(stack.ask("GET", "/metrics")[0] == 404, "metrics are not published")
    bindings = "--format={{json .HostConfig.PortBindings}}"
    published = _run("docker", "inspect", bindings, stack.container("redis")).strip()
    _hold(published in ("{}", "null"), "Redis is not published", published)

    stack("kill", "redis")
    _until(lambda: not _stored(stack) and stack.metric("ironclip_redis_up") == 0, 30, "Redis is missed")
    status, answer, _ = stack.ask("POST", "/classify?label_set=emoji&top_k=1", octopus)
    _hold(status == 200 and answer["predictions"][0]["label"] == "octopus", "without Redis it goes on", answer)
    stack("start", "redis")
    began = time.monotonic()
    _until(lambda: _stored(stack) and stack.metric("ironclip_redis_up") == 1, 60, "Redis is found again")
    measured["seconds_until_redis_is_used_again"] = round(time.monotonic() - began, 1)

    measured["seconds_of_the_drain"] = round(_drained(stack), 2)
    stack("down")
    stack.up()
    status, answer, _ = stack.ask("GET", "/label-sets/kept")
    _hold(status == 200, "label sets outlive the containers", answer)
    again = stack.ask("POST", "/classify?label_set=emoji&top_k=1", guitar)[2]
    _hold("hit" in again["Cache-Status"], "Redis shares what replicas have computed", dict(again))
    return measured


def check_prometheus(stack: Stack) -> None:
    """Of the profile `observe`: it asks the service, and every alert of ours is one that it can compute."""
    stack.up("prometheus", profile="observe")
    api = f"http://127.0.0.1:{stack.prometheus_port}/api/v1"

    def asked(path: str) -> Any:
        with _OPENER.open(f"{api}/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def healthy() -> bool:
        targets = [target["health"] for target in asked("targets")["activeTargets"]]
        rules = [rule["health"] for group in asked("rules")["groups"] for rule in group["rules"]]
        return targets == ["up"] and len(rules) > 5 and set(rules) == {"ok"}

    _until(healthy, 90, "Prometheus asks the service, and computes every alert")


def check_keys(keys: Path, variables: Mapping[str, str]) -> None:
    """As the README says it: a folder with a key, the second file, and a key taken out again."""
    stack = Stack({**variables, "KEYS": str(keys), "IRONCLIP_REDIS_MAC_KEY": "0123456789abcdef" * 4}, KEYS_FILES)
    try:
        key, _ = _new_key(stack, keys, "keys.toml"), _new_key(stack, keys, "other.toml")
        stack.up()
        _hold(stack.ask("GET", "/models")[0] == 401, "nobody is let in without a key")
        bearer = {"Authorization": f"Bearer {key}"}
        _hold(stack.ask("GET", "/models", **bearer)[0] == 200, "the key is let in")
        if "PROMETHEUS_IMAGE" in variables:
            check_prometheus(stack)  # which has no key
        (keys / "other.toml").replace(keys / "keys.toml")  # as editors do it: another file in the old one's place
        _until(lambda: stack.ask("GET", "/models", **bearer)[0] == 401, 10, "a key that is taken out is refused")
    except BaseException:
        stack.show()
        raise
    finally:
        stack.remove()


def _stored(stack: Stack) -> bool:
    """Whether a label set can be registered, which takes Redis."""
    return stack.ask("PUT", "/label-sets/kept", {"labels": ["octopus", "rocket"]})[0] in (200, 201)


def _new_key(stack: Stack, keys: Path, name: str) -> str:
    """A key, whose entry is in a new file of this folder that the container's user can read."""
    once = ["run", "--rm", "--no-deps", "-T", "--pull=never", f"--user={os.getuid()}:{os.getgid()}"]
    made = stack(*once, f"--volume={keys}:/keys", "ironclip", *_NEW_KEY, "--append", f"/keys/{name}")
    keys.chmod(0o755)
    (keys / name).chmod(0o644)
    key = re.search(r"ick_\S+", made)
    if key is None:
        raise Failed(f"keys new printed no key:\n{made}")
    return key[0]


def _drained(stack: Stack) -> float:
    """Stop the service at work: what was asked before is answered, and the process ends with 0. Returns the seconds."""
    asked: list[tuple[float, float, object]] = []  # begun, ended, and the status or what went wrong
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            texts, began = [f"an emoji of thing number {number}" for number in range(256)], time.monotonic()
            try:
                outcome: object = stack.ask("POST", "/embed", {"texts": texts})[0]
            except (OSError, http.client.HTTPException) as error:
                outcome = error
            asked.append((began, time.monotonic(), outcome))

    name, asking = stack.container("ironclip"), [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        _until(lambda: stack.metric("ironclip_requests_in_flight") >= 2, 20, "the service is at work")
        start = time.monotonic()
        stack("stop", "ironclip")
        seconds = time.monotonic() - start
    finally:
        stopped.set()
        for thread in asking:
            thread.join(30)
    sent = _stop_seen(name, start)
    before = [(ended, outcome) for began, ended, outcome in asked if began < sent]
    _hold(all(outcome == 200 for _, outcome in before), "what was asked before the stop is answered", before)
    _hold(max(ended for ended, _ in before) > sent, "some of it after the stop", (before[-3:], sent))
    code = _run("docker", "inspect", "--format={{.State.ExitCode}}", name).strip()
    _hold(code == "0", "the process ends with 0", code)
    return seconds


def _stop_seen(container: str, began: float) -> float:
    """When the container was told to stop, by `time.monotonic`: as Docker has it in its events."""
    offset = time.time() - time.monotonic()
    since, until = f"--since={began + offset - 1:.3f}", f"--until={time.time():.3f}"
    told = '--format={{.TimeNano}} {{.Action}} {{index .Actor.Attributes "signal"}}'
    said = _run("docker", "events", since, until, f"--filter=container={container}", "--filter=event=kill", told)
    if not said:
        raise Failed(f"Docker has no event of a signal to {container}")
    return int(said.split()[0]) / 1e9 - offset


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def _hold(true: bool, promise: str, found: object = "") -> None:
    if not true:
        raise Failed(f"not so: {promise}\n{found}".rstrip())
    print(f"  {promise}", flush=True)


def _until(condition: Callable[[], bool], seconds: float, promise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not so within {seconds:g} s: {promise}")
        time.sleep(0.02)
    print(f"  {promise}", flush=True)


def _compose() -> list[str]:
    """Compose as a part of Docker's command, or as a command of its own."""
    done = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if done.returncode == 0 else ["docker-compose"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def main() -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="compose_test.py"
    )
    parser.add_argument("--image", default="ironclip:cpu", help="of the service; `docker compose build` makes it")
    parser.add_argument("--redis-image", default="redis:7.2-alpine", help="`docker compose pull redis` fetches it")
    parser.add_argument("--prometheus-image", default="", help="of the profile observe, which is left out without it")
    options = parser.parse_args()
    # Whoever ends this wants its containers gone too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    variables = {"IMAGE": options.image, "REDIS_IMAGE": options.redis_image}
    if options.prometheus_image:
        variables["PROMETHEUS_IMAGE"] = options.prometheus_image
    if shutil.which("docker") is None:
        print("compose-test: docker is not installed; this needs Docker's engine and Compose", file=sys.stderr)
        return 1
    try:
        versions = {
            "engine": _run("docker", "version", "--format={{.Server.Version}}").strip(),
            "compose": _run(*_compose(), "version", "--short").strip(),
        }
        for image in variables.values():
            _run("docker", "image", "inspect", image)
        stack = Stack(variables)
        try:
            measured = check_stack(stack)
            if options.prometheus_image:
                check_prometheus(stack)
        except BaseException:
            stack.show()
            raise
        finally:
            stack.remove()
        with tempfile.TemporaryDirectory() as folder:
            check_keys(Path(folder), variables)
    except (Failed, OSError, ValueError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        print(f"compose-test: {error}", file=sys.stderr)
        return 1
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    results = read_results()
    results["compose"] = {
        **versions,
        "image": options.image,
        "image_commit": _run("docker", "image", "inspect", f"--format={label}", options.image).strip(),
        "redis_image": options.redis_image,
        "prometheus_image": options.prometheus_image,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": git("rev-parse", "HEAD"),
        "modified": modified("compose.yaml", "docker", "k8s", "ironclip", "service"),
        **measured,
    }
    write_results(results)
    print(f"compose-test: all checks passed; {RESULTS.relative_to(ROOT)} has what was measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())

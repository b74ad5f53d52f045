"""The Dockerfiles by hadolint, the locks against pyproject.toml, and the health check against a real server."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import healthcheck
import lock
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service.__main__ import main
from service.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
LOCKS = ROOT / "docker" / "locks"
EXTRAS = {"service": "serve", "training": "train"}
PLATFORM = {"sys_platform": "linux", "platform_machine": "x86_64", "implementation_name": "cpython"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint(path: Path) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    result = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_images_share_the_layer_of_torch() -> None:
    """Both Dockerfiles are the same up to the lock of the rest, so torch is built, stored and pulled once."""
    texts = [path.read_text(encoding="utf-8") for path in DOCKERFILES]
    service, training = (text[text.index("ARG BASE_IMAGE") :] for text in texts)
    assert "install --no-deps --requirement torch.txt" in service
    assert service.split("COPY docker/locks/service.txt")[0] == training.split("COPY docker/locks/training.txt")[0]


def _pins(*names: str) -> dict[str, list[Requirement]]:
    """The lock's packages by name; more than one where versions differ by marker."""
    pins: dict[str, list[Requirement]] = {}
    for name in names:
        for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if re.match(r"[a-z0-9]", line):
                pin = Requirement(line.removesuffix(" \\"))
                pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("torch", ["torch-cpu", "torch-cuda"])
@pytest.mark.parametrize("name", EXTRAS)
def test_the_lock_has_what_pyproject_asks_for(name: str, torch: str, python: str) -> None:
    """A dependency that was added, or whose floor was raised, needs `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = _pins(name, torch)
    for text in [*project["dependencies"], *project["optional-dependencies"][EXTRAS[name]]]:
        wanted = Requirement(text)
        machine = PLATFORM | {"python_version": python, "python_full_version": f"{python}.9"}
        if wanted.marker is not None and not wanted.marker.evaluate(machine):
            continue
        found = [
            pin
            for pin in pins.get(canonicalize_name(wanted.name), [])
            if pin.marker is None or pin.marker.evaluate(machine)
        ]
        assert len(found) == 1, f"{wanted.name}: {len(found)} pins for Python {python}; run `make lock`"
        (pin,) = found[0].specifier
        assert pin.operator == "=="
        assert Version(pin.version) in wanted.specifier, f"{found[0]} is not {wanted}; run `make lock`"


@pytest.mark.parametrize("name", ["service", "training", "torch-cuda"])
def test_every_pin_has_hashes_and_no_index_is_named(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^--(index|extra|find|trusted)", text, re.MULTILINE)
    for block in re.split(r"\n(?=[a-z0-9])", text)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]


def test_cpu_builds_have_hashes_all_or_none() -> None:
    """One hash makes pip ask for all: half of them would be a build that cannot succeed."""
    text = (LOCKS / "torch-cpu.txt").read_text(encoding="utf-8")
    assert "://" not in text
    blocks = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert len({"--hash=sha256:" in block for block in blocks}) == 1


_DIGESTS = {name: name[0] * 64 for name in ("a86", "brm", "cwin", "dold", "e313")}
_PAGE = """<!DOCTYPE html><html><body>
<a href="/whl/cpu/{name}-{v}%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl#sha256={a86}" data-core-metadata="x">1</a><br/>
<a href="https://files.example/{name}-{v}%2Bcpu-cp312-cp312-manylinux_2_28_aarch64.whl#sha256={brm}">2</a><br/>
<a href='/whl/cpu/{name}-{v}%2Bcpu-cp312-cp312-win_amd64.whl#sha256={cwin}'>3</a><br/>
<a href="/whl/cpu/{name}-0.1.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl#sha256={dold}">4</a><br/>
<a href="/whl/cpu/{name}-{v}-cp313-cp313t-linux_x86_64.whl#sha256={e313}">5</a><br/>
<a href="/whl/cpu/{name}-{v}.tar.gz#sha256={dold}">6</a><br/>
</body></html>"""


class _Index(http.server.BaseHTTPRequestHandler):
    """An index of CPU builds, as PyTorch's is written."""

    def do_GET(self) -> None:
        versions = dict(pin.split("==") for pin in lock.TORCH)
        name = self.path.strip("/").rsplit("/", 1)[-1]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(_PAGE.format(name=name, v=versions[name], **_DIGESTS).encode())

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_lock_takes_hashes_of_cpu_builds_where_their_index_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And keeps them where it does not, as long as they are of the same versions."""
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "_resolve", lambda *_: [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "torch-cpu.txt"
    with _serving(_Index) as server:
        index = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(sys, "argv", ["lock.py", f"--torch-index={index}/whl/cpu"])
        assert lock.main() == 0
    hashes = [f" \\\n    --hash=sha256:{_DIGESTS[name]}" for name in ("a86", "brm", "e313")]
    locked = path.read_text(encoding="utf-8")
    assert locked.split("\n", 1)[1] == "".join(f"{pin}{''.join(hashes)}\n" for pin in lock.TORCH)

    assert lock.main() == 0  # the server is gone
    assert path.read_text(encoding="utf-8") == locked
    assert "the hashes that it had" in capsys.readouterr().err
    monkeypatch.setattr(lock, "TORCH", ("torch==9.9.9", "torchvision==8.8.8"))
    assert lock.main() == 0
    assert path.read_text(encoding="utf-8").splitlines()[1:] == list(lock.TORCH)
    assert "versions alone" in capsys.readouterr().err


def test_torch_is_the_same_in_both_variants_and_nowhere_else() -> None:
    cpu, cuda = _pins("torch-cpu"), _pins("torch-cuda")
    for name in ("torch", "torchvision"):
        assert str(cpu[name][0].specifier) == str(cuda[name][0].specifier)
    assert set(cpu) == {"torch", "torchvision"}
    assert not {name for name in _pins("service", "training") if name.startswith(("torch", "nvidia", "cuda", "triton"))}


@pytest.mark.slow
def test_the_sbom_lists_what_the_locks_list(tmp_path: Path) -> None:
    """Slow, and it needs a package index: uv fetches the tool."""
    subprocess.run([sys.executable, str(ROOT / "docker" / "sbom.py"), str(tmp_path)], check=True, timeout=280)
    for image in EXTRAS:
        for variant in ("cpu", "cuda"):
            found = json.loads((tmp_path / f"{image}-{variant}.cdx.json").read_text(encoding="utf-8"))
            assert found["bomFormat"] == "CycloneDX"
            listed = {(canonicalize_name(one["name"]), one["version"]) for one in found["components"]}
            pins = _pins(image, f"torch-{variant}")
            wanted = {(name, next(iter(pin.specifier)).version) for name, of in pins.items() for pin in of}
            assert listed == wanted


def test_the_readme_has_what_was_measured() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", "docker/README.md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"run `make readme`\n{result.stdout}{result.stderr}"


class _Answering(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b'{"reason":"draining"}')

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """A server whose /readyz answers what the test says."""
    with _serving(_Answering) as server:
        yield server


def _health(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "docker" / "healthcheck.py")]
    return subprocess.run(
        command, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1"])
def test_health_follows_readyz(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    port = str(server.server_address[1])
    assert _health(IRONCLIP_PORT=port, IRONCLIP_HOST=host).returncode == 0
    monkeypatch.setattr(_Answering, "status", 503)
    unready = _health(IRONCLIP_PORT=port, IRONCLIP_HOST=host)
    assert unready.returncode == 1
    assert "draining" in unready.stdout
    server.shutdown()
    server.server_close()
    gone = _health(IRONCLIP_PORT=port, IRONCLIP_HOST=host)
    assert gone.returncode == 1
    assert "refused" in gone.stdout


_FILE = """port = 8300
host = "127.0.0.3"
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the images have Python 3.11 or newer, which reads TOML")
@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ((), {}),
        ((), {"IRONCLIP_PORT": "8100", "IRONCLIP_HOST": "127.0.0.2"}),
        ((), {"ironclip_port": "8100"}),
        ((), {"IRONCLIP_CONFIG": _FILE}),
        ((), {"IRONCLIP_CONFIG": _FILE, "IRONCLIP_PORT": "8100"}),
        ((), {"IRONCLIP_CONFIG": 'encoders = {demo = "demo"}'}),
        (("--port", "8200"), {"IRONCLIP_CONFIG": _FILE, "IRONCLIP_PORT": "8100"}),
        (("serve", "--port=8200", "--encoders", "port=demo"), {"IRONCLIP_PORT": "8100"}),
        (("--port", "8201", "serve", "--po", "8200", "--hos=127.0.0.4"), {}),
        (("fleet", "--devices", "cpu,cpu", "--port", "8200"), {"IRONCLIP_CONFIG": _FILE}),
    ],
)
def test_health_asks_where_the_service_listens(
    command: tuple[str, ...], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check's short way to the address, beside the service's own."""
    for name in [name for name in os.environ if name.upper().startswith("IRONCLIP_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name == "IRONCLIP_CONFIG":
            (tmp_path / "ironclip.toml").write_text(value, encoding="utf-8")
            value = str(tmp_path / "ironclip.toml")
        monkeypatch.setenv(name, value)
    settings: list[Settings] = []
    monkeypatch.setattr("service.__main__.serve", lambda found: settings.append(found) or 0)
    monkeypatch.setattr("service.fleet.plan", lambda devices, found, overrides: settings.append(found) or [])
    monkeypatch.setattr("service.fleet.Fleet.run", lambda fleet: 0)
    assert main([*command]) == 0
    for front in ((), ("/sbin/docker-init", "--")):
        started = [*front, "/opt/venv/bin/python", "-m", "service", *command, ""]  # as /proc has it, split
        assert healthcheck.address(started, os.environ) == (settings[0].host, settings[0].port)


def test_health_reads_the_command_of_process_1(
    server: http.server.HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Path("/proc/1/cmdline") == healthcheck.COMMAND
    monkeypatch.setattr(healthcheck, "COMMAND", tmp_path / "cmdline")
    port = str(server.server_address[1])
    healthcheck.COMMAND.write_bytes(b"\0".join([b"python", b"-m", b"service", b"--port", port.encode(), b""]))
    assert healthcheck.main() == 0
    monkeypatch.setenv("IRONCLIP_CONFIG", str(tmp_path / "none.toml"))
    assert healthcheck.main() == 1
    assert "none.toml" in capsys.readouterr().out


def test_health_stays_cheap() -> None:
    """It runs every few seconds: of what it imports, all is the standard library's, and little."""
    code = "import sys; sys.argv = ['']; import healthcheck; healthcheck.main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docker", capture_output=True, text=True, timeout=30)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "http" in loaded
    assert not loaded & {"argparse", "tomllib", "asyncio", "pydantic", "service", "ironclip", "torch"}


def test_a_start_may_take_as_long_as_in_the_chart() -> None:
    """An encoder from a hub has to come first; a container that is unhealthy meanwhile fails `up --wait`."""
    values = yaml.safe_load((ROOT / "k8s" / "ironclip" / "values.yaml").read_text(encoding="utf-8"))
    startup = values["probes"]["startup"]
    dockerfile = (ROOT / "docker" / "service.Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"^HEALTHCHECK .*--start-period=(\d+)m ", dockerfile, re.MULTILINE)
    assert found is not None
    assert 60 * int(found[1]) >= startup["periodSeconds"] * startup["failureThreshold"]


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif("IMAGE_TEST" not in os.environ, reason="builds images of gigabytes: `make image-test`")
def test_the_images_build_and_run() -> None:
    result = subprocess.run([sys.executable, str(ROOT / "docker" / "image_test.py")], cwd=ROOT, timeout=5400)
    assert result.returncode == 0

"""The Dockerfiles by hadolint, the locks against pyproject.toml, and the health check against a real server."""

from __future__ import annotations

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

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """A server whose /readyz answers what the test says."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif("IMAGE_TEST" not in os.environ, reason="builds images of gigabytes: `make image-test`")
def test_the_images_build_and_run() -> None:
    result = subprocess.run([sys.executable, str(ROOT / "docker" / "image_test.py")], cwd=ROOT, timeout=5400)
    assert result.returncode == 0

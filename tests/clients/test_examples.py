"""Examples run as they are printed: the client's README, its command, and JavaScript; against the demo encoder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.conftest import ServiceProcess, served

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"
COMMAND = "ironclip-client "


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with the demo encoder."""
    with served(tmp_path_factory.mktemp("demo"), encoders="demo") as service:
        yield service


def run(service: ServiceProcess, *command: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command as a user does, with the client where it would be installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python" / "src"), "IRONCLIP_URL": service.url}
    return subprocess.run(command, cwd=ROOT, env=environment, input=data, capture_output=True, timeout=120)


def client(service: ServiceProcess, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return run(service, sys.executable, "-m", "ironclip_client", *arguments, data=data)


def test_the_clients_readme_runs(demo: ServiceProcess) -> None:
    code = blocks(ROOT / "clients" / "python" / "README.md", "python")
    assert len(code) >= 5
    # Each block alone, all in one process: what they share is the time to start it.
    script = "\n".join(f"exec({block.replace(ADDRESS, demo.url)!r}, {{'__name__': 'readme'}})" for block in code)
    result = run(demo, sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr.decode()
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("carrot ")
    assert lines[1] == "pizza"
    assert lines[2].startswith("failed: ")
    assert "guitar.png guitar" in lines
    assert "strawberry" in lines
    assert lines[-1] == "carrot rocket"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_commands_of_the_clients_readme_run(demo: ServiceProcess) -> None:
    (commands,) = (
        one for one in blocks(ROOT / "clients" / "python" / "README.md", "sh") if f"{COMMAND}classify" in one
    )
    script = commands.replace(COMMAND, f'"{sys.executable}" -m ironclip_client ')
    result = run(demo, "bash", "-euo", "pipefail", "-c", script)
    assert result.returncode == 0, result.stderr.decode()
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    best = [one["predictions"][0]["label"] for one in answers if "predictions" in one]
    assert len(best) == len(list((ROOT / "ironclip" / "demo" / "samples").glob("*.png")))
    assert {"carrot", "guitar"} <= set(best)
    assert next(one for one in answers if "points" in one)["label"] == "carrot"


def test_javascript_examples_run(demo: ServiceProcess, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    if int(re.findall(r"\d+", version)[0]) < 18:
        pytest.skip(f"node is {version.strip()}; fetch came with 18")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    code = [block for page in pages for block in blocks(page, "js")]
    assert len(code) >= 2
    for i, block in enumerate(code):
        script = tmp_path / f"example-{i}.mjs"
        script.write_text(block.replace(ADDRESS, demo.url), encoding="utf-8")
        result = run(demo, node, str(script))
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.decode().strip() == "carrot"


def test_the_command_tells_what_failed(demo: ServiceProcess, tmp_path: Path) -> None:
    sample = "ironclip/demo/samples/carrot.png"
    result = client(demo, "classify", sample, "no-such.png", "-", "--labels", "carrot", "x", data=b"junk")
    assert result.returncode == 1
    good, missing, junk = (json.loads(line) for line in result.stdout.splitlines())
    assert good["predictions"][0]["label"] == "carrot"
    assert "no-such.png" in missing["error"]["detail"]
    assert junk["error"]["code"] == "image-unsupported"

    name = os.fsdecode(b"no-\xff-such.png")  # a file's name need not be text
    result = client(demo, "classify", name, sample, "--labels", "carrot", "x")
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 2)

    result = client(demo, "models", "no-such-model")
    assert result.returncode == 1
    assert json.loads(result.stderr)["error"]["code"] == "encoder-not-found"

    probe = ["probe", sample, "--label-set", "emoji", "--option"]
    for wrong in (
        ["classify", sample],
        [*probe, "nonsense"],
        [*probe, 'labels=["a", "b"]'],
        [*probe, "wait=false", "--follow"],
        [*probe, "timeout=soon"],
        [],
    ):
        result = client(demo, *wrong)
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr

    out = tmp_path / "fooled.png"
    asked = ["probe", sample, "--labels", "carrot", "rocket", "--option", "eps=[64]", "--option", "seconds=5"]
    result = client(demo, *asked, "--follow", "--out", str(out))
    assert result.returncode == 0, result.stderr
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert [events[0], events[-1]] == ["started", "done"]
    fooled = json.loads(client(demo, "classify", str(out), "--labels", "carrot", "rocket").stdout)
    assert fooled["predictions"][0]["label"] == "rocket"
    result = run(demo, sys.executable, "-m", "ironclip_client", "--url", "http://127.0.0.1:9", "ready")
    assert (result.returncode, json.loads(result.stdout)["ready"]) == (1, False)

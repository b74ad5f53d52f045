"""README and docs do what they say: commands run against a real service, code runs, tables are current."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"
# Folders that `make` and training leave in a checkout.
FOREIGN = {"build", "data", "dist", "node_modules", "runs", "state"}
# The first label of each answer of a page's commands.
ANSWERS = {"README.md": ["carrot", "penguin", "octopus"], "ask.md": ["guitar"], "operations.md": [], "probe.md": []}


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _markdown() -> list[Path]:
    """Every Markdown file of the checkout."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in FOREIGN]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def test_the_readme_is_short() -> None:
    """What a stranger reads in five minutes; the rest belongs into docs."""
    assert len(README.splitlines()) <= 480
    assert len(README.encode()) <= 35_000


def test_tables_are_current() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in [*PAGES, ROOT / "training" / "README.md"]]
    result = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", *pages],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"run `make readme`\n{result.stdout}{result.stderr}"


def test_make_readme_knows_every_table() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "cogapp" in line)
    made = {path for word in line.split(" -r ")[1].split() for path in ROOT.glob(word)}
    assert made >= {path for path in _markdown() if "[[[cog" in path.read_text(encoding="utf-8")}


def test_code_ends_where_it_should() -> None:
    """A fence that is not closed turns the text behind it into code."""
    for path in _markdown():
        inside = False
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("```"):
                assert not inside or line == "```", f"{path}: {line} within code"
                inside = not inside
            assert not (inside and line.startswith("## ")), f"{path}: {line} within code"
        assert not inside, path


def _prose(path: Path) -> str:
    """Without code, in which brackets and hashes are something else."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _prose(path), re.M):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        first = anchor = re.sub(r"[^\w -]", "", title).replace(" ", "-")
        again = 0
        while anchor in anchors:
            again += 1
            anchor = f"{first}-{again}"
        anchors.add(anchor)
    return anchors


def test_links_lead_somewhere() -> None:
    broken, links = [], 0
    for path in _markdown():
        text = re.sub(r"`[^`\n]*`", "``", _prose(path))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            links += 1
            if not there.exists() or (anchor and anchor not in _anchors(there)):
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken
    assert links > 50


@pytest.fixture
def service_url(start_service: Callable[..., Any], tmp_path: Path) -> str:
    url: str = start_service(state_dir=tmp_path / "state").url
    return url


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_commands_get_answers(service_url: str) -> None:
    answered = {}
    for page in PAGES:
        commands = [block for block in _blocks(page, "sh") if "curl" in block and "$KEY" not in block]
        if commands:
            answered[page.name] = [label for block in commands for label in _best(block, service_url)]
    assert answered == ANSWERS


def _best(block: str, service_url: str) -> list[str]:
    """Run a block; the best label of each of its answers that has labels."""
    # A marker between the commands of one block keeps their answers apart.
    script = block.replace(ADDRESS, service_url).replace("curl -s", "echo @@@; curl -sS --fail-with-body")
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
    answers = [json.loads(answer) for answer in result.stdout.split("@@@") if answer.strip()]
    return [answer["predictions"][0]["label"] for answer in answers if "predictions" in answer]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.usefixtures("redis_installed")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_from_a_clone_to_production(tiny_artifact: Path, tmp_path: Path) -> None:
    """The three blocks as they stand, but for ports, folders, a tiny encoder, and seconds of load."""
    section = README.split("## From a clone to production")[1].split("\n## ")[0]
    start, ask, load = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    # Without a bound Redis takes the machine's memory; with another policy it drops label sets, or refuses writes.
    assert "--maxmemory 256mb --maxmemory-policy volatile-lru" in start
    ports = {"8000": str(free_port()), "9000": str(free_port()), "6379": str(free_port())}

    def here(script: str) -> str:
        script = re.sub(r"\b(8000|9000|6379)\b", lambda found: ports[found[0]], script)
        script = script.replace(".venv/bin/python", sys.executable).replace("keys.toml", str(tmp_path / "keys.toml"))
        script = script.replace("--daemonize yes", f"--daemonize yes --dir {tmp_path} --pidfile {tmp_path}/redis.pid")
        script = re.sub(r"^make setup .*$", "", script, flags=re.M)
        script = script.replace("--users 20 --seconds 30", "--users 7 --seconds 4 --pictures 64 --size 48x48")
        script = script.replace("--scenario mix", "--scenario classify")  # test_locust.py has the mix
        told = f"--summary {tmp_path}/summary.json --report {tmp_path}/report.html"
        script = script.replace("loadtests.locust_run", f"loadtests.locust_run {told}")
        return script.replace("\nmake serve\n", f"\n{sys.executable} -m service & SERVICE=$!\n")

    ready = f"until curl -sf http://127.0.0.1:{ports['8000']}/readyz; do kill -0 $SERVICE; sleep 0.2; done"
    # Redis may have been slower to start than the service, on a busy machine.
    redis_up = (
        f"until curl -s http://127.0.0.1:{ports['9000']}/metrics | grep '^ironclip_redis_up 1'; do sleep 0.2; done"
    )
    end = f"kill $SERVICE $(cat {tmp_path}/redis.pid) || true"
    script = "\n".join(
        [f"trap '{end}' EXIT", here(start), ready, redis_up, "echo @@@", here(ask), "echo @@@", here(load)]
    )
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "IRONCLIP_PORT": ports["8000"],
        "IRONCLIP_ENCODERS": f"tiny={tiny_artifact}",
        "IRONCLIP_STATE_DIR": str(tmp_path / "state"),
        "IRONCLIP_REDIS_TIMEOUT_MS": "2000",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    _, asked, loaded = done.stdout.split("@@@")
    assert '"encoder":{"name":"tiny"' in asked
    for line in ("ironclip_ready 1.0", "ironclip_redis_up 1.0", "ironclip_keys_file_ok 1.0"):
        assert line in asked
    assert json.loads((tmp_path / "summary.json").read_text())["total"]["failures"] == 0, loaded


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_that_lock_it(start_service: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> None:
    make, serve, ask = re.findall(
        r"^```sh\n(.*?)^```", OPERATIONS.split("## Lock it")[1].split("\n## ")[0], re.M | re.S
    )
    keys_file = tmp_path / "keys.toml"

    def run(script: str, **variables: str) -> str:
        script = script.replace(".venv/bin/python", sys.executable).replace("keys.toml", str(keys_file))
        command = ["bash", "-euo", "pipefail", "-c", script]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    made = run(make + 'echo "$KEY"')
    key = made.split()[-1]
    assert key.startswith("ick_")
    settings = dict(re.findall(r"IRONCLIP_(\w+)=(\S+)", serve))
    assert settings == {"KEYS_FILE": "keys.toml"}
    service = start_service(keys_file=keys_file, encoders=f"tiny={tiny_artifact}")
    answer = run(ask.replace(ADDRESS, service.url), KEY=key)
    assert json.loads(answer)["encoder"]["name"] == "tiny"
    assert json.loads(run(ask.replace(ADDRESS, service.url), KEY="none"))["code"] == "key-unknown"


def test_python_blocks_run(
    service_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [block for page in PAGES for block in _blocks(page, "python")]
    assert len(blocks) >= 6
    for block in blocks:
        host, ours = ADDRESS.removeprefix("http://"), service_url.removeprefix("http://")
        exec(block.replace(host, ours), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "2 vectors" in printed
    assert "b'carrot'" in printed

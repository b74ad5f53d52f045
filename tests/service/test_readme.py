"""The README does what it says: its commands run against a real service, its code runs, its tables are current."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_tables_are_current() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "README.md", "training/README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"run `make readme`\n{result.stdout}{result.stderr}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).exists(), target


@pytest.fixture
def service_url(start_service: Callable[..., Any], tmp_path: Path) -> str:
    url: str = start_service(state_dir=tmp_path / "state").url
    return url


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_commands_get_answers(service_url: str) -> None:
    commands = [block for block in _blocks("sh") if "curl" in block and "$KEY" not in block]
    assert commands
    answers = []
    for block in commands:
        # A marker between the commands of one block keeps their answers apart.
        script = block.replace(ADDRESS, service_url).replace("curl -s", "echo @@@; curl -sS --fail-with-body")
        result = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
        answers += [json.loads(answer) for answer in result.stdout.split("@@@") if answer.strip()]
    best = [answer["predictions"][0]["label"] for answer in answers if "predictions" in answer]
    assert best == ["carrot", "penguin", "guitar", "octopus"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_that_lock_it(start_service: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> None:
    make, serve, ask = re.findall(r"^```sh\n(.*?)^```", README.split("## Lock it")[1].split("\n## ")[0], re.M | re.S)
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
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        host, ours = ADDRESS.removeprefix("http://"), service_url.removeprefix("http://")
        exec(block.replace(host, ours), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "2 vectors" in printed
    assert "b'carrot'" in printed

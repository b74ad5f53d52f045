"""`python -m service selfcheck` as a process: what it finds, what it writes, and that it says no."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from service.__main__ import main
from tests.service.conftest import ROOT, service_environment


def selfcheck(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", "selfcheck", "--seconds", "0.5", *arguments],
        cwd=ROOT,
        env=service_environment(**{"dtype": "float32", "threads": 1, "max_batch": 6, **settings}),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_sound_machine_passes_and_the_file_says_what_was_found(tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    # A share of a busy machine says nothing of this code: it alone may fail here.
    done = selfcheck("--encoder", str(tiny_artifact), "--json", str(file), device="cpu", probe_quantum_ms=60_000)
    found: dict[str, Any] = json.loads(file.read_text())
    checks = {check["name"]: check for check in found["checks"]}
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed <= {"throughput-near-the-floor"}, done.stdout
    assert done.returncode == bool(failed)
    assert found["passed"] == (not failed)
    assert len(checks) == len(found["checks"]) == 8
    assert f"{8 - len(failed)} of 8 checks passed" in done.stdout
    assert done.stderr.count("selfcheck: checking") == 8
    assert found["machine"]["device"] == "cpu"
    assert found["dtype"]["chosen"] == "float32"
    assert found["forward"]["chosen"] == "off"
    assert list(found["batches"]) == ["1", "2", "4", "6"]
    assert all(times["milliseconds"] > 0 for times in found["batches"].values())
    assert found["own_features"] == {
        "pictures": 19,
        "min_cosine": found["own_features"]["min_cosine"],
        "nearest_is_own": 19,
    }
    assert found["own_features"]["min_cosine"] > 0.9999
    assert set(found["determinism"]) == {"alone_twice", "in_3", "in_6"}
    throughput = found["throughput"]
    assert throughput["tower_images_per_second"] > throughput["batcher_images_per_second"] * 0.5 > 0
    assert math.isfinite(found["float32_error"])
    assert found["memory_mib"]["resident_peak"] > 100


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Settings for the command in this process."""
    for name in [name for name in os.environ if name.startswith("IRONCLIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"dtype": "float32", "threads": torch.get_num_threads(), "max_batch": 2}.items():
        monkeypatch.setenv(f"IRONCLIP_{name.upper()}", str(value))
    return monkeypatch


def test_what_does_not_hold_is_said_with_what_to_do(
    tiny_artifact: Path, here: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.setenv("IRONCLIP_PROBE_QUANTUM_MS", "0.001")
    assert main(["selfcheck", "--encoder", str(tiny_artifact), "--device", "cpu", "--seconds", "0.1"]) == 1
    said = capsys.readouterr().out
    assert "FAIL a-probe-fits-its-quantum" in said
    assert "raise IRONCLIP_PROBE_QUANTUM_MS" in said


def test_an_encoder_a_forward_or_a_setting_that_is_not_there(
    tiny_artifact: Path, here: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selfcheck", "--encoder", "/no/such/folder"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err
    here.setenv("IRONCLIP_COMPILE", "graphs")
    assert main(["selfcheck", "--encoder", str(tiny_artifact), "--device", "cpu"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
    here.setenv("IRONCLIP_COMPILE", "fast")
    assert main(["selfcheck"]) == 2
    assert "IRONCLIP_COMPILE" in capsys.readouterr().err

"""docker/results.json, of which `make image-test` and `make compose-test` each write a part, and what git says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docker" / "results.json"


def read_results() -> dict[str, Any]:
    """All parts that were measured, by name."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else {}


def write_results(results: dict[str, Any]) -> None:
    """Write all parts."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def modified(*paths: str) -> bool:
    """Whether these are otherwise than in the last commit."""
    return bool(git("status", "--porcelain", "--", *paths))


def git(*arguments: str) -> str:
    """What git says of this repository; "unknown" where it says nothing."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"

"""Locust's users against a real service: every kind gets answers, and nobody loads another machine by mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def locust_run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtests.locust_run", "--size", "48x40", "--pictures", "300"]
    files = ["--summary", str(folder / "summary.json"), "--report", str(folder / "report.html")]
    return subprocess.run(
        [*command, *files, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_all_kinds_of_users_are_answered(tiny_service: Any, tmp_path: Path) -> None:
    done = locust_run(tmp_path, "--url", tiny_service.url, "--users", "50", "--seconds", "4", "--scenario", "mix")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = summary["requests"]
    kinds = {"classify fresh", "classify repeated", "classify by label set", "embed", "probe", "register label set"}
    assert set(rows) == kinds
    assert all(row["requests"] > row["failures"] for row in rows.values()), done.stdout
    assert summary["total"]["requests"] == sum(row["requests"] for row in rows.values())
    assert summary["lasted_seconds"] > 2
    # Pictures that come again are answered from the cache, and are no part of what a forward takes.
    assert rows["classify repeated"]["hits"]["requests"] > 0
    assert rows["classify fresh"]["fresh"]["requests"] > 0
    for row in (*rows.values(), summary["total"]):
        kinds_of_it = [row[kind]["requests"] for kind in ("fresh", "hits", "refused", "failed") if kind in row]
        assert sum(kinds_of_it) == row["requests"]
    assert 0 < summary["total"]["p50_ms"] <= summary["total"]["p99_ms"]
    assert "classify fresh:" in done.stdout
    assert "Locust" in (tmp_path / "report.html").read_text()


def test_a_request_that_fails_ends_with_status_1(tiny_service: Any, tmp_path: Path) -> None:
    """A route that is not there: locust is told of every kind of failure, and so is the shell."""
    done = locust_run(tmp_path, "--url", f"{tiny_service.url}/nowhere", "--users", "2", "--seconds", "2")
    assert done.returncode == 1
    assert "404" in done.stdout


def test_only_the_loopback_is_this_machine() -> None:
    ours = ["http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost"]
    others = ["http://192.0.2.1:8000", "http://localhost.example:8000", "http://[2001:db8::1]", "http://", "", None]
    # In a process of its own: locust replaces much of the standard library in the one that imports it.
    code = f"from loadtests.locustfile import is_loopback; print([is_loopback(url) for url in {[*ours, *others]!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == str([True] * len(ours) + [False] * len(others))


def test_it_takes_leave_to_load_another_machine(tmp_path: Path) -> None:
    done = locust_run(tmp_path, "--url", "http://192.0.2.1:9", "--users", "1", "--seconds", "1")
    assert done.returncode != 0
    assert "--allow-remote" in done.stderr
    assert not (tmp_path / "summary.json").exists()

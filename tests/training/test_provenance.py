"""The commit that results name, in a checkout and in an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.provenance import commit


def test_without_git_the_image_says_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An image has no git: a run there must not fail at its very end, when it writes the artifact."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SOURCE_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("SOURCE_COMMIT", "a" * 40)
    assert commit() == "a" * 40


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("SOURCE_COMMIT", "b" * 40)
    assert commit() == "b" * 40

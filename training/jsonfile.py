"""Result files: JSON for people, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.checkpoint import CheckpointError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``, None where there is no file; raises CheckpointError for one that is not readable."""
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable: {error}; remove it to compute it again") from error
    return content


def finished(path: Path, key: str) -> dict[str, Any] | None:
    """The result in ``path`` if its ``key`` is this one; None where there is none, or one of something else."""
    found = read_json(path)
    return found if found is not None and found.get("key") == key else None


def write_json(path: Path, content: Any) -> None:
    """Indented, UTF-8, a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".writing")
    staged.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    staged.replace(path)

"""Tables of the README, from the files that hold the numbers; `make readme` puts them in, a test compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "ironclip" / "demo"
RESULTS = ROOT / "loadtests" / "results"


def settings_table() -> str:
    """Every setting of the service."""
    from service.settings import settings_markdown

    return settings_markdown()


def _meta(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO / folder / "ironclip.json").read_text(encoding="utf-8"))
    return content


def tree_of_the_house() -> str:
    """The top two floors of the repository, one phrase a room, from the docstrings."""
    import ast

    rows = []
    for package in ("ironclip", "service", "training", "loadtests"):
        rows.append(f"{package + '/':<28}{_first_line(ROOT / package / '__init__.py')}")
        entries = sorted((ROOT / package).iterdir(), key=lambda path: (path.is_dir(), path.name))
        for entry in entries:
            if entry.name.startswith(("_", ".")) or (entry.is_file() and entry.suffix != ".py"):
                continue
            source = entry if entry.is_file() else entry / "__init__.py"
            if source.is_file():
                ast.parse(source.read_text(encoding="utf-8"))
                name = entry.name + ("/" if entry.is_dir() else "")
                rows.append(f"  {name:<26}{_first_line(source)}")
    return "```\n" + "\n".join(rows) + "\n```\n"


def _first_line(path: Path) -> str:
    import ast

    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = docstring.partition("\n")[0].rstrip(".")
    head, colon, tail = line.partition(": ")
    # "Encoder: an open_clip model ..." says its own name first.
    return tail if colon and len(head) < 28 else line

"""The finished cells of a study, read from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ironclip.errors import OptionError

Column = tuple[str, str, str, str, str, str]


def column_of(cell: Mapping[str, Any]) -> Column:
    """(vendor, attack, its options, threat, level, dtype) of a cell."""
    options = " ".join(f"{key}={value}" for key, value in sorted(cell["options"].items()))
    threat, dtype = cell["threat"]["label"], cell["encoder"]["dtype"]
    return cell["sample"]["name"], cell["attack"], options, threat, cell["level"], dtype


def read_cells(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Encoder -> its finished cells; encoders in the order of their names.

    Raises:
        OptionError: a row holds cells of two encoders, or a column of two samples: a table of them would say nothing.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    samples: dict[Column, str] = {}
    for folder in sorted((results / "cells").glob("*")):
        files = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".partial.json"))
        cells = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        digests = {cell["encoder"]["digest"] for cell in cells}
        if len(digests) > 1:
            raise OptionError(f"{folder} holds cells of {len(digests)} encoders: delete those of the older ones")
        for cell in cells:
            column = column_of(cell)
            if samples.setdefault(column, cell["sample"]["digest"]) != cell["sample"]["digest"]:
                raise OptionError(f"{folder}: {' '.join(column)} was measured on other pictures than elsewhere")
        if cells:
            rows[folder.name] = cells
    return rows


def usual_dtype(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    dtypes = [cell["encoder"]["dtype"] for row in cells.values() for cell in row]
    return max(sorted(set(dtypes)), key=dtypes.count, default="")


def device_of(cell: Mapping[str, Any]) -> str:
    """What a cell was measured on."""
    return str(cell["encoder"].get("device", "cpu"))


def in_short(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell without its pictures' outcomes, as an artifact carries it."""
    return {
        "sample": cell["sample"]["name"],
        "pictures": cell["sample"]["pictures"],
        "threat": cell["threat"]["label"],
        "dtype": cell["encoder"]["dtype"],
        "device": device_of(cell),
        **{part: cell[part] for part in ("attack", "options", "level", "clean", "robust", "robust_interval")},
    }

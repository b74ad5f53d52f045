"""Results that are made in parts: a JSON file of finished cells, which the same command goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def within(names: Sequence[str], seconds: float) -> Iterator[str]:
    """The names in turn, as long as the next one should end within `seconds` (by what they took so far); 0: all."""
    began = time.monotonic()
    for done, name in enumerate(names):
        lasted = time.monotonic() - began
        if seconds and done and lasted + lasted / done > seconds:
            return
        yield name


class OtherPlan(Exception):
    """The file's cells were measured otherwise than asked now."""


class Cells:
    """Finished parts of a measurement.

    Args:
        path: of the JSON file; made with the first cell.
        plan: what was asked; cells of another plan are not mixed with these.
        about: what else the file says of the measurement, such as the machine; of the last run.
        fresh: forget what is there.

    Raises:
        OtherPlan: the file has another plan.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], about: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "plan": dict(plan), "cells": {}}
        if path.exists() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(key for key in {*plan, *old["plan"]} if plan.get(key) != old["plan"].get(key))
            if different:
                raise OtherPlan(
                    f"{path} was measured with other options ({', '.join(different)}): add --fresh to measure anew, "
                    "or --name for another file"
                )
            self.content["cells"] = old["cells"]

    def __contains__(self, key: str) -> bool:
        cell = self.content["cells"].get(key)
        return cell is not None and "failed" not in cell

    def put(self, key: str, cell: Mapping[str, Any]) -> None:
        """Keep a finished cell; one with `failed` in it is measured again by the next run.

        It says at which commit it was made, and how busy the machine was, since others may be of another day.
        """
        made: dict[str, Any] = {name: self.content.get(name) for name in ("commit", "modified")}
        made["load_average"] = [round(load, 2) for load in os.getloadavg()]
        self.content["cells"][key] = {**cell, "made": made}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)

    def items(self) -> dict[str, dict[str, Any]]:
        """All cells by key."""
        cells: dict[str, dict[str, Any]] = self.content["cells"]
        return cells

"""The result file of a measurement: what was run and on what, written beside the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.machine import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results"


def describe_run(module: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """Command, machine and commit; ask before anything is measured, since the machine's load is part of it.

    Args:
        module: of loadtests, as it is run.
        argv: its arguments; those of this process if None.
    """
    arguments = " ".join(argv if argv is not None else sys.argv[1:])
    return {
        "command": f"python -m loadtests.{module} {arguments}",
        "machine": describe_machine(),
        **describe_commit(),
    }


def write_result(name: str, report: Mapping[str, Any]) -> None:
    """Write the result of this name; nothing for an empty one."""
    if name:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")

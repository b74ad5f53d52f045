"""The peers' result as a picture: throughput by clients, and goodput by load, a colour a server."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from loadtests.peers.report import Report

_GREY = ["#8aa1b4", "#b49a8a", "#9ab48a", "#a58ab4", "#bdbdbd"]
_OURS = "#d1495b"


def draw(source: Path, target: Path) -> int:
    """Draw a result file; returns the exit status."""
    if not source.exists():
        print(f"There is no {source}: run `python -m loadtests.peers run`.", file=sys.stderr)
        return 1
    report = Report(json.loads(source.read_text(encoding="utf-8")))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = [dtype for dtype in ("float32", "bfloat16") if report.names(dtype)]
    if not dtypes:
        print(f"{source} has no finished part to draw: run `python -m loadtests.peers run`.", file=sys.stderr)
        return 1
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(10, 3.6 * len(dtypes)), squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        _bars(row[0], report, dtype, "closed", ["1", "8", "32"], "images_per_second")
        row[0].set(title=f"{dtype}: images a second", xlabel="clients, one request each")
        _bars(row[1], report, dtype, "open", ["0.5x floor", "0.8x floor", "2x floor"], "goodput_per_second")
        deadline = 1000 * report.plan["deadlines"][dtype]
        row[1].set(title=f"{dtype}: answered within {deadline:.0f} ms, a second", xlabel="Poisson arrivals")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"drawn to {target}")
    return 0


def _bars(axis: Any, report: Report, dtype: str, part: str, groups: list[str], field: str) -> None:
    names = report.names(dtype)
    width = 0.8 / len(names)
    greys = iter(_GREY)
    for number, name in enumerate(names):
        colour = _OURS if name == "ironclip" else next(greys)
        values = [report.values(dtype, name, part, group, field) for group in groups]
        middle = [statistics.median(found) for found in values]
        low = [m - min(found) for m, found in zip(middle, values, strict=True)]
        high = [max(found) - m for m, found in zip(middle, values, strict=True)]
        places = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(places, middle, width, label=name, color=colour, yerr=[low, high], error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)

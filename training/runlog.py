"""What a run says while it goes: a line for people, JSON lines, TensorBoard where it is installed, plots at the end."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Progress of one run; silent on all ranks but the first.

    Args:
        folder: of the run: ``log.jsonl`` grows there, TensorBoard's files lie in ``tensorboard``.
        first: the step that the run begins (or goes on) at.
        steps: where it ends.
        speaks: whether this process reports at all.
    """

    def __init__(self, folder: Path, first: int, steps: int, speaks: bool) -> None:
        self._folder, self._first, self._steps, self._speaks = folder, first, steps, speaks
        self._began = time.monotonic()
        self._board: Any = None
        if speaks and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float], line: str = "") -> None:
        """Record ``values`` of a step (a number each) and print ``line`` with the time that is left."""
        if not self._speaks:
            return
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        pace = (time.monotonic() - self._began) / max(1, step - self._first)
        left = pace * (self._steps - step)
        parts = line or " ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"step {step}/{self._steps} {parts}, {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """One line for people."""
        if self._speaks:
            print(text, flush=True)

    def close(self) -> None:
        """End TensorBoard's file, and draw the run where matplotlib is installed."""
        if self._board is not None:
            self._board.close()
        if self._speaks and importlib.util.find_spec("matplotlib") is not None:
            plot_run(self._folder)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log's entries by step; of a step that a resumed run went through again, the later entry's values.

    A line that was cut short, when the disk was full or the power went, is left out.
    """
    entries: dict[float, dict[str, float]] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries.setdefault(entry["step"], {}).update(entry)
    return [entries[step] for step in sorted(entries)]


def plot_run(folder: Path) -> None:
    """``run.png``: loss and its parts over the steps, and clean and robust accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_log(folder) if (folder / "log.jsonl").is_file() else []
    if not entries:
        return
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    accuracies = ("clean", "robust")
    aside = {"step", "rate", "norm", "of_floor", "images_per_second", *accuracies}
    for key in sorted({key for entry in entries for key in entry} - aside):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        losses.plot(*zip(*points, strict=True), label=key)
    for key in accuracies:
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            scores.plot(*zip(*points, strict=True), marker="o", label=f"{key} accuracy (%)")
    for axes in (losses, scores):
        axes.set_xlabel("step")
        if axes.has_data():
            axes.legend()
    figure.savefig(folder / "run.png", dpi=110)
    plt.close(figure)

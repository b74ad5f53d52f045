"""f_0(x), kept in a file for pictures that never change, so that the frozen original runs once for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]


class AnchorCache:
    """Float32 features by index in ``folder``, shared by the processes of a machine and by resumed runs.

    A row is written once, by the first step that needs it; rows are checked by a mark behind them, so a row that a kill
    cut short is computed again.

    Args:
        folder: where the file lies.
        count: pictures.
        dim: of the features.
        key: what the features depend on; a file with another key is begun anew.
    """

    def __init__(self, folder: Path, count: int, dim: int, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, note = folder / "anchors.f32", folder / "anchors.json"
        wanted = {"key": key, "count": count, "dim": dim}
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        size = count * (dim + 1) * 4
        if found != wanted or not path.is_file() or path.stat().st_size != size:
            path.unlink(missing_ok=True)
            with path.open("wb") as handle:
                handle.truncate(size)
            note.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        self._rows = np.memmap(path, np.float32, "r+", shape=(count, dim + 1))

    def __call__(self, indices: Tensor, pixels: Tensor, compute: Features) -> Tensor:
        """f_0 of the pictures at ``indices`` (int64 [b]): [b, dim] in their dtype, computed only where not kept."""
        rows = torch.from_numpy(self._rows[indices.numpy()])
        missing = rows[:, -1] != 1
        if bool(missing.any()):
            with torch.no_grad():
                new = compute(pixels[missing.to(pixels.device)]).float().cpu()
            self._rows[indices[missing].numpy(), :-1] = new.numpy()
            self._rows[indices[missing].numpy(), -1] = 1
            rows[missing, :-1] = new
        return rows[:, :-1].to(pixels)

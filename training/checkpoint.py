"""Complete checkpoints: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ironclip.errors import IronclipError


class CheckpointError(IronclipError):
    """A checkpoint cannot be read, or belongs to another config."""

    code = "checkpoint-error"


class NonFiniteLoss(IronclipError):
    """The loss or a gradient became infinite or not a number; the last checkpoint is still good."""

    code = "non-finite-loss"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) beside ``path`` and move it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


# What a resumed run may change: how it reports. Where a change of length is noted, its length too.
REPORTING = frozenset({"threads", "log_every", "checkpoint_every"})
MAY_CHANGE = REPORTING | {"steps"}


def load_checkpoint(
    path: Path, config: dict[str, Any], may_change: frozenset[str] = MAY_CHANGE
) -> dict[str, Any] | None:
    """Read a checkpoint that was written for ``config``, ``may_change`` apart; None when there is none.

    Raises:
        CheckpointError: the file is no checkpoint, or its config differs (the differing keys are named).
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    saved = state.get("config", {})
    differing = sorted({key for key in {*saved, *config} if saved.get(key) != config.get(key)} - may_change)
    if differing:
        raise CheckpointError(f"{path} was made with another {', '.join(differing)}; use another run folder")
    return state

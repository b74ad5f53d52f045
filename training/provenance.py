"""What a result was made by."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch


def commit() -> str:
    """The checkout's commit; without one, what `SOURCE_COMMIT` says (an image's revision), or ``unknown``."""
    built_from = os.environ.get("SOURCE_COMMIT") or "unknown"
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # an image has no git
        return built_from
    return found.stdout.strip() or built_from


def made_on(device: torch.device) -> dict[str, Any]:
    """What a measurement was made on and by: device, CPU threads, torch, commit."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """A GPU's name as its driver says it; ``cpu`` and the like otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

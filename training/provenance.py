"""What a result was made by."""

from __future__ import annotations

import subprocess
from typing import Any

import torch


def commit() -> str:
    """The checkout's commit, or ``unknown``."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


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

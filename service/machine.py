"""What a measurement of the service was made on: enough to judge a number by, nothing that names a host."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ironclip.resources import usable_cpus


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, its driver, and the versions that decide how fast it is; None for what cannot be found out."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_model(),
        "cpus": usable_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_mib": properties.total_memory // 2**20,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return found


def memory_mib(device: torch.device) -> dict[str, int]:
    """The most memory that was used so far, MiB: resident, and on a GPU what was allocated and what was reserved."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    found = {"resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // scale}
    if device.type == "cuda":
        found["gpu_allocated_peak"] = torch.cuda.max_memory_allocated(device) // 2**20
        found["gpu_reserved_peak"] = torch.cuda.max_memory_reserved(device) // 2**20
    return found


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

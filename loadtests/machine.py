"""What a measurement was made on: enough to judge a number by, nothing that names a host."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "open_clip_torch", "pillow", "fastapi", "uvicorn", "uvloop", "httptools", "numpy")
_ROOT = Path(__file__).parent.parent


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, and versions of what the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "allocator": {
            name: Path(value).name if name == "LD_PRELOAD" else value
            for name, value in os.environ.items()
            if name == "LD_PRELOAD" or name.startswith(("MALLOC_", "OMP_", "GOMP_"))
        },
        "nice": os.nice(0),
        # Taken before the measurement: other work on the machine, which every number suffers from.
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def describe_commit() -> dict[str, Any]:
    """The commit of the checkout, and whether tracked files of the code differ from it."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "ironclip", "service", "loadtests")
    return {"commit": commit, "modified": bool(changed)}


def process_seconds(pid: int) -> float:
    """CPU seconds, user and system, that a process of this machine has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> int:
    """Resident memory of a process, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _cpu_model() -> str:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        if match := re.search(r"model name\s*: (.*)", text):
            name = match[1]
        if match := re.search(r"flags\s*: (.*)", text):
            flags = set(match[1].split())
    return ", ".join([name, *sorted(flags & {"amx_bf16", "avx512_bf16", "avx512f", "avx2"})])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()

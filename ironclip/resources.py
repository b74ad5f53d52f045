"""How many CPUs this process may use: cores it may run on, and the quota of its control group.

torch and OpenMP look at cores alone. On a node of eight cores a container limited to two would run eight threads,
which the kernel then stops together for three quarters of each period.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Cores this process may run on, or its CPU quota rounded up where that is less; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that this process's control groups grant, or None without a limit.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`), in the group and in all above it; what a
    container cannot see of its groups is mounted at their root. What cannot be read is no limit.

    Args:
        root: where control groups are mounted.
        membership: the groups of this process.
    """
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _quotas(root, path, _version_2)
        elif "cpu" in controllers.split(","):
            found += _quotas(root / controllers if (root / controllers).is_dir() else root / "cpu", path, _version_1)
    return min(found, default=None)


def _quotas(mount: Path, path: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    group = Path(path.strip("/"))
    for folder in (group, *group.parents):
        if ".." in folder.parts:  # a group outside the namespace that this process sees
            continue
        try:
            quota = read(mount / folder)
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if quota is not None:
            yield quota


def _version_2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _version_1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))

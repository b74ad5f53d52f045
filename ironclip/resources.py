"""How many CPUs and how much memory this process may use: the machine's, within the limits of its control groups.

torch and OpenMP look at cores alone. On a node of eight cores a container limited to two would run eight threads,
which the kernel then stops together for three quarters of each period; and one that takes more memory than its limit is
killed, however much the node has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_Read = Callable[[Path], "float | None"]


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
    return _least(root, membership, "cpu", _cpus_2, _cpus_1)


def usable_memory() -> int:
    """Bytes that this process may have: the machine's, or its control groups' limit where that is less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return there if limit is None else min(there, int(limit))


def memory_limit(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Bytes that this process's control groups grant, or None without a limit.

    Reads `memory.max` and `memory.limit_in_bytes`, as `cpu_quota` does; takes what that takes.
    """
    return _least(root, membership, "memory", _memory_2, _memory_1)


def _least(root: Path, membership: Path, controller: str, version_2: _Read, version_1: _Read) -> float | None:
    """The tightest limit of the groups that this process is in and of all above them; what cannot be read is none."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits(root, path, version_2)
        elif controller in controllers.split(","):
            mount = root / controllers if (root / controllers).is_dir() else root / controller
            found += _limits(mount, path, version_1)
    return min(found, default=None)


def _limits(mount: Path, path: str, read: _Read) -> Iterator[float]:
    group = Path(path.strip("/"))
    for folder in (group, *group.parents):
        if ".." in folder.parts:  # a group outside the namespace that this process sees
            continue
        try:
            limit = read(mount / folder)
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if limit is not None:
            yield limit


def _cpus_2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _cpus_1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))


def _memory_2(folder: Path) -> float | None:
    text = (folder / "memory.max").read_text(encoding="ascii").strip()
    return None if text == "max" else float(int(text))


def _memory_1(folder: Path) -> float | None:
    return float(int((folder / "memory.limit_in_bytes").read_text(encoding="ascii")))

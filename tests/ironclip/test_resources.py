"""CPU quotas and memory limits of control groups, as containers have them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ironclip.resources import cpu_quota, memory_limit, usable_cpus, usable_memory


def _group(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text + "\n")


def _membership(folder: Path, *lines: str) -> Path:
    path = folder / "membership"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_version_2_in_a_container(tmp_path: Path) -> None:
    """Docker and Kubernetes: the group is the root of what the container sees."""
    _group(tmp_path, ".", cpu__max="150000 100000")
    assert cpu_quota(tmp_path, _membership(tmp_path, "0::/")) == 1.5


def test_version_2_tightest_of_all_above(tmp_path: Path) -> None:
    """A limit of a pod, or of a systemd slice, binds what is in it."""
    _group(tmp_path, "slice/unit", cpu__max="max 100000")
    _group(tmp_path, "slice", cpu__max="50000 100000")
    assert cpu_quota(tmp_path, _membership(tmp_path, "0::/slice/unit")) == 0.5


def test_version_1_seen_from_inside(tmp_path: Path) -> None:
    """The path is the host's, which the container does not see; its own group is mounted at the root."""
    _group(tmp_path, "cpu,cpuacct", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    membership = _membership(tmp_path, "5:memory:/docker/1", "4:cpu,cpuacct:/docker/1", "0::/docker/1")
    assert cpu_quota(tmp_path, membership) == 2.0


def test_memory_of_both_versions(tmp_path: Path) -> None:
    _group(tmp_path, "pod/box", memory__max="max")
    _group(tmp_path, "pod", memory__max="4294967296")
    assert memory_limit(tmp_path, _membership(tmp_path, "0::/pod/box")) == 4 << 30
    _group(tmp_path, "memory", memory__limit_in_bytes="1073741824")
    assert memory_limit(tmp_path, _membership(tmp_path, "5:memory:/docker/1", "0::/docker/1")) == 1 << 30
    assert memory_limit(tmp_path, tmp_path / "missing") is None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < usable_memory() <= there


@pytest.mark.parametrize("text", ["max 100000", "", "garbage", "100000 0"])
def test_no_limit_or_nothing_readable(tmp_path: Path, text: str) -> None:
    _group(tmp_path, ".", cpu__max=text)
    assert cpu_quota(tmp_path, _membership(tmp_path, "0::/")) is None
    assert cpu_quota(tmp_path, tmp_path / "missing") is None


def test_a_group_outside_the_namespace(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root, ".", cpu__max="max 100000")
    _group(tmp_path, "other", cpu__max="1000 100000")
    assert cpu_quota(root, _membership(tmp_path, "0::/../other")) is None


def test_never_less_than_one_nor_more_than_the_cores() -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A real control group with one CPU's worth of time."""
    name = f"ironclip-test-{os.getpid()}"
    for root, quota in ((Path("/sys/fs/cgroup"), "cpu.max"), (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us")):
        group = root / name
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                if (group / quota).exists():
                    (group / quota).write_text("100000 100000" if quota == "cpu.max" else "100000")
                    yield group
                    return
            finally:
                group.rmdir()
    pytest.skip("control groups cannot be made here")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to be limited from")
def test_a_real_quota_bounds_the_models_threads(limited_group: Path) -> None:
    """torch itself would take every core; that is why the quota is read."""
    code = (
        "import torch; from ironclip.resources import usable_cpus; from service.runtime import use_threads; "
        "print(torch.get_num_threads(), usable_cpus(), use_threads(0), use_threads(2))"
    )
    procs = limited_group / "cgroup.procs"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: procs.write_text(str(os.getpid())),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    alone, usable, used, asked = map(int, result.stdout.split())
    assert alone > 1
    assert (usable, used, asked) == (1, 1, 2)

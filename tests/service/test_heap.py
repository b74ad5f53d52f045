"""Memory that was freed is the system's again, not the C library's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
from service.heap import trim_heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

pieces = [bytes(4000) for _ in range(50_000)]
last = pieces[-1]  # above all that is freed: without being told to, glibc gives nothing back
full = resident()
del pieces
trim_heap()
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such call")
def test_freed_memory_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) > 150_000_000

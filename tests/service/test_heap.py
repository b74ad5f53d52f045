"""Threads share heaps, and memory that was freed is the system's again, not the C library's."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ironclip.artifact import save_artifact
from ironclip.resources import usable_cpus
from service.app import create_app
from service.core import Service
from service.settings import Settings
from tests.conftest import make_tiny_encoder
from tests.service.conftest import until

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


_THREADS = """
import ctypes, sys, threading
from service.heap import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
libc, all_there = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = ctypes.c_void_p

def work():
    all_there.wait()
    libc.malloc(ctypes.c_size_t(50_000))
    all_there.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_stats()
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such call")


@glibc
@pytest.mark.parametrize(
    ("how", "given", "heaps"),
    [
        ("own", {}, min(9, 8 * (os.cpu_count() or 1))),
        ("shared", {}, min(9, max(2, usable_cpus()))),
        ("shared", {"MALLOC_ARENA_MAX": "4"}, 4),
        ("shared", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, 3),
    ],
)
def test_threads_share_heaps_unless_the_environment_says_how_many(how: str, given: dict[str, str], heaps: int) -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name.upper()}
    environment.pop("GLIBC_TUNABLES", None)
    environment |= given
    command = [sys.executable, "-c", _THREADS, how]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert found.stderr.count("Arena ") == heaps


@glibc
def test_freed_memory_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) > 150_000_000


def test_an_encoder_that_was_left_out_of_collections_goes_all_the_same(tiny_artifact: Path, tmp_path: Path) -> None:
    """What was there at start is left out of the collector's passes, and still freed when it is unloaded."""
    other = save_artifact(make_tiny_encoder(seed=3), tmp_path / "other", {"name": "other"})
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, state_dir=tmp_path / "state", model_specs=[str(other)])
    app = create_app(settings)
    gc.collect()
    gc.disable()
    try:
        with TestClient(app) as client:
            until(lambda: client.get("/readyz").status_code == 200, 30)
            assert gc.get_freeze_count() > 10_000
            service: Service = app.state.service
            weight = weakref.ref(next(service.encoder("tiny").encoder.parameters()))
            assert client.put("/models/tiny", json={"spec": str(other)}).status_code == 202
            until(lambda: weight() is None, 30)
    finally:
        gc.enable()
        gc.unfreeze()

"""float32 that is float32: no TF32 on a GPU, no bfloat16 inside oneDNN, where gradients are taken.

PyTorch's switches belong to the process and are read by every operation of every thread; convolutions on a GPU use
TF32 by default. TF32 keeps 10 bits of a number, as many as float16: a probe's bracket would be the format's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.Lock()
_inside = 0
_found: list[Any] = []


def _switches() -> list[tuple[Any, str, Any]]:
    """Each switch of this PyTorch: its holder, its name, and its value for exact arithmetic."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # PyTorch 2.9 and newer
        holders = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]  # type: ignore[attr-defined]
        holders += [backends.mkldnn.matmul, backends.mkldnn.conv]  # type: ignore[attr-defined]
        return [(holder, "fp32_precision", "ieee") for holder in holders]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 exactly in here, and leave the process's switches as they were found.

    Threads may be inside at the same time: the first one in turns the switches, the last one out turns them back.
    Meanwhile other threads compute exactly too, which costs them time and no correctness.
    """
    global _inside
    with _LOCK:
        if not _inside:
            _found[:] = [getattr(holder, name) for holder, name, _ in _switches()]
            _set_exact()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                for (holder, name, _), value in zip(_switches(), _found, strict=True):
                    setattr(holder, name, value)


def keep_float32_exact() -> None:
    """Compute float32 exactly from now on, in the whole process: what a service does that has several threads."""
    with _LOCK:
        _set_exact()
        _found[:] = [value for _, _, value in _switches()]


def _set_exact() -> None:
    for holder, name, value in _switches():
        if getattr(holder, name) != value:
            setattr(holder, name, value)

"""open_clip without torch's compiler, which is 140 MiB and two seconds of a start, for a service that compiles nothing.

torchvision and timm import `torch._dynamo` for one function each: whether a device can be compiled for, and the mark of
what is not to be compiled. While they are imported, stand-ins have these two. Whoever asks for more of it, then or
later, gets the real one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


class _StandIn(ModuleType):
    """In the place of a module, until somebody asks for what it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Finder(MetaPathFinder, Loader):
    """Gives the compiler's other modules, once it is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{_COMPILER}."):
            return None
        _real(name)  # raises ModuleNotFoundError where there is none
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed."""


_FINDER = _Finder()


@contextmanager
def without_compiler() -> Iterator[None]:
    """While it is entered, modules that import torch's compiler do not load it; once it is loaded, nothing is done."""
    if _COMPILER in sys.modules:
        yield
        return
    compiler, utils = _StandIn(_COMPILER), _StandIn(f"{_COMPILER}.utils")
    compiler.__dict__.update(__path__=[], utils=utils, disable=_disable)
    utils.__dict__.update(is_compile_supported=_is_compile_supported)
    sys.modules.update({compiler.__name__: compiler, utils.__name__: utils})
    sys.meta_path.insert(0, _FINDER)
    try:
        yield
    finally:
        _take_out()


def _take_out() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _real(name: str) -> ModuleType:
    _take_out()
    return importlib.import_module(name)


def _disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """As `torch._dynamo.disable`: the compiler goes by the mark."""
    if function is None:
        return _disable
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def _is_compile_supported(device_type: str) -> bool:
    return bool(_real(f"{_COMPILER}.utils").is_compile_supported(device_type))

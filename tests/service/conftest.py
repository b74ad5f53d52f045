"""Fixtures of the service's tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """The module that makes hostile and rare pictures (`malformed.py`)."""
    spec = importlib.util.spec_from_file_location("malformed", Path(__file__).with_name("malformed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def malformed_images(corpus: ModuleType) -> dict[str, bytes]:
    """Pictures that must be refused, by name; the name's part before the slash is the error's code."""
    images: dict[str, bytes] = corpus.refused()
    return images


@pytest.fixture(scope="session")
def odd_images(corpus: ModuleType) -> dict[str, bytes]:
    """Pictures that look hostile or rare and must be decoded, by name."""
    images: dict[str, bytes] = corpus.odd()
    return images

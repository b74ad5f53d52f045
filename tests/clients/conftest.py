"""Fixtures of the client's tests: the service's own, and a faulty gateway before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ironclip_client import Client, RetryPolicy

from tests.clients.gateway import Gateway, serving
from tests.service.conftest import ServiceProcess, anyio_backend, start_service, tiny_service

__all__ = ["anyio_backend", "start_service", "tiny_service"]

SAMPLES = Path(__file__).parents[2] / "ironclip" / "demo" / "samples"
# Tests that provoke retries do not wait for real ones.
QUICK = RetryPolicy(max_retries=3, base=0.01, cap=0.05)


@pytest.fixture(scope="module")
def running_gateway(tiny_service: ServiceProcess) -> Iterator[Gateway]:
    with serving(tiny_service.port) as gateway:
        yield gateway


@pytest.fixture
def gateway(running_gateway: Gateway) -> Gateway:
    """A gateway before `tiny_service` that passes everything on until it is told of faults."""
    running_gateway.faults.clear()
    running_gateway.seen.clear()
    return running_gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    """A client that asks through the gateway."""
    with Client(gateway.url, retries=QUICK) as client:
        yield client


@pytest.fixture
def samples() -> Path:
    """The folder of the sample pictures."""
    return SAMPLES

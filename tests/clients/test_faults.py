"""When something goes wrong on the way: the client waits as it is told, and knows what not to repeat."""

from __future__ import annotations

import asyncio
import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ironclip_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    Forbidden,
    IronclipError,
    NotReady,
    Overloaded,
    RateLimited,
    RetryPolicy,
    ServerError,
    Unauthorized,
    Unavailable,
    UsageError,
)
from ironclip_client.errors import from_response, parse_retry_after

from tests.clients.conftest import QUICK
from tests.clients.gateway import Fault, Gateway
from tests.service.conftest import free_port

LABELS = ["carrot", "rocket"]


def problem(status: int, code: str, **more: Any) -> Fault:
    body = {"type": f"/problems/{code}", "title": code, "status": status, "detail": f"It is {code}.", "code": code}
    headers = {"Content-Type": "application/problem+json", "X-Request-Id": "of-the-fault"}
    return Fault(status, headers, json.dumps(body | more).encode())


def test_it_waits_as_long_as_the_service_asks(client: Client, gateway: Gateway, samples: Path) -> None:
    """The problem's milliseconds go before the header's whole seconds; a header alone counts too."""
    overload = problem(429, "overloaded", retry_after_ms=300)
    gateway.faults += [
        Fault(429, {**overload.headers, "Retry-After": "30"}, overload.body),
        Fault(503, {"Retry-After": "1"}, b"<h1>Service Unavailable</h1>"),
    ]
    answer = client.classify(samples / "carrot.png", LABELS)
    assert answer.meta.retries == 2
    first, second, third = (one.at for one in gateway.asked("POST"))
    assert second - first >= 0.3
    assert third - second >= 1
    times = [int(one.headers["x-request-timeout-ms"]) for one in gateway.asked("POST")]
    assert times[0] - times[2] >= 1000, "the service is told of the time that is left"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(hang_up="before"),
        Fault(hang_up="after"),
        Fault(502, body=b"bad gateway"),
        Fault(504, body=b"<p>gateway timeout"),
        problem(503, "unavailable"),
        problem(503, "not-ready"),
    ],
    ids=lambda fault: fault.hang_up or f"{fault.status}-{len(fault.body)}",
)
def test_what_only_computes_is_asked_again(client: Client, gateway: Gateway, samples: Path, fault: Fault) -> None:
    gateway.faults += [fault, fault]
    assert client.classify(images=[samples / "carrot.png"], labels=LABELS).meta.retries == 2
    assert len(gateway.asked("POST")) == 3


def test_it_gives_up_after_so_many_tries(client: Client, gateway: Gateway) -> None:
    gateway.faults += [problem(429, "overloaded")] * 10
    with pytest.raises(Overloaded, match="4 tries") as raised:
        client.models()
    assert len(gateway.seen) == 1 + QUICK.max_retries
    assert (raised.value.code, raised.value.tries) == ("overloaded", 4)
    gateway.faults.clear()
    gateway.faults += [problem(429, "overloaded")]
    with Client(gateway.url, retries=0) as once, pytest.raises(Overloaded):
        once.models()


def test_it_does_not_wait_for_what_comes_too_late(client: Client, gateway: Gateway) -> None:
    gateway.faults.append(problem(429, "rate-limited", retry_after_ms=60_000))
    start = time.monotonic()
    with pytest.raises(RateLimited) as raised:
        client.models(timeout=20)
    assert time.monotonic() - start < 20
    assert raised.value.retry_after == 60
    assert len(gateway.seen) == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (problem(500, "internal-error"), ServerError),
        (problem(504, "deadline-exceeded", limit=10), DeadlineExceeded),
        (problem(401, "unauthorized"), Unauthorized),
        (problem(403, "forbidden"), Forbidden),
        (Fault(401), Unauthorized),
        (problem(503, "not-in-this-version"), Unavailable),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_come_out_the_same_is_not_asked_again(
    gateway: Gateway, fault: Fault, kind: type[IronclipError]
) -> None:
    gateway.faults.append(fault)
    policy = RetryPolicy(max_retries=0 if kind is Unavailable else 3, base=0.01)
    with Client(gateway.url, retries=policy) as client, pytest.raises(kind) as raised:
        client.models()
    assert type(raised.value) is kind
    assert len(gateway.seen) == 1
    assert raised.value.request_id == fault.headers.get("X-Request-Id", "")


def test_writes_are_repeated_only_where_that_is_safe(client: Client, gateway: Gateway) -> None:
    """After a broken line nobody knows whether the write was heeded."""
    lost = Fault(hang_up="after")
    gateway.faults.append(lost)
    stored = client.label_sets.put("faults", LABELS)
    assert len(gateway.asked("PUT")) == 2
    gateway.faults.append(lost)
    with pytest.raises(ConnectionFailed, match="may have been heeded"):
        client.label_sets.put("faults", ["other"], if_match=stored)
    assert len(gateway.asked("PUT")) == 3
    other = client.label_sets.get("faults")
    assert other.names == ("other",), "it was heeded"
    gateway.faults += [problem(429, "overloaded"), problem(503, "not-ready"), lost]
    with pytest.raises(ConnectionFailed, match="may have been heeded"):
        client.label_sets.delete("faults", if_match=other)
    assert len(gateway.asked("DELETE")) == 3
    assert "faults" not in [one.name for one in client.label_sets.list()]


def test_a_probe_is_started_once_however_often_it_is_asked_for(client: Client, gateway: Gateway, samples: Path) -> None:
    """After a lost answer the call is sent again, and its key tells the service that it has begun already."""
    gateway.faults += [problem(429, "overloaded"), Fault(hang_up="after"), Fault(502, body=b"bad gateway")]
    started = client.probe_start(samples / "carrot.png", LABELS, seconds=0.5)
    asked = gateway.asked("POST")
    assert len(asked) == 4
    keys = {one.headers["idempotency-key"] for one in asked}
    assert len(keys) == 1
    again = client.probe_start(samples / "carrot.png", LABELS, seconds=0.5, idempotency_key=keys.pop())
    assert again.id == started.id
    assert client.probe_start(samples / "carrot.png", LABELS, seconds=0.5).id != started.id
    with pytest.raises(UsageError, match="printable"):
        client.probe_start(samples / "carrot.png", LABELS, idempotency_key="a key")


def test_nobody_there(samples: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retries=QUICK) as client, pytest.raises(ConnectionFailed, match=r"refused.*4 tries"):
        client.label_sets.delete("anything")

    async def ask() -> None:
        async with AsyncClient(url, retries=QUICK) as other:
            await other.classify(samples / "carrot.png", LABELS)

    with pytest.raises(ConnectionFailed, match="4 tries"):
        asyncio.run(ask())


class Closing(BaseHTTPRequestHandler):
    """Answers, and closes a connection that was idle for longer than `idle`, as a proxy before the service does."""

    protocol_version = "HTTP/1.1"
    connections: ClassVar[list[tuple[str, int]]] = []
    idle: ClassVar[float] = 30.0

    def setup(self) -> None:
        self.timeout = self.idle
        super().setup()

    def do_DELETE(self) -> None:
        self.connections.append(self.client_address)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("idle", "pause", "connections"), [(30.0, 4.5, 1), (0.2, 0.6, 2)])
def test_an_idle_connection_is_used_again_unless_the_other_end_has_closed_it(
    monkeypatch: pytest.MonkeyPatch, idle: float, pause: float, connections: int
) -> None:
    """A write is sent once: it must not meet a connection that is closed already."""
    monkeypatch.setattr(Closing, "idle", idle)
    monkeypatch.setattr(Closing, "connections", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Closing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}", retries=0) as client:
            for wait in (pause, 0):
                client.label_sets.delete("fruit", if_match='"digest"')
                time.sleep(wait)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert len(Closing.connections) == 2
    assert len(set(Closing.connections)) == connections


def test_the_time_is_for_all_tries_together(gateway: Gateway, samples: Path) -> None:
    gateway.faults += [problem(429, "overloaded", retry_after_ms=400)] * 100
    start = time.monotonic()
    with Client(gateway.url, retries=100) as client, pytest.raises(Overloaded) as raised:
        client.classify(samples / "carrot.png", LABELS, timeout=1.5)
    assert raised.value.tries <= 4
    assert time.monotonic() - start < 10


def test_the_asynchronous_client_tries_again_alike(gateway: Gateway, samples: Path) -> None:
    gateway.faults += [problem(429, "overloaded", retry_after_ms=300), Fault(hang_up="after"), Fault(503)]

    async def ask() -> Any:
        async with AsyncClient(gateway.url, retries=QUICK) as other:
            return await other.classify(samples / "carrot.png", LABELS)

    assert asyncio.run(ask()).meta.retries == 3
    first, second, *_ = (one.at for one in gateway.asked("POST"))
    assert second - first >= 0.3


def test_retry_after_is_read_in_both_forms() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("0.25") == 0.25
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < (parse_retry_after(date) or 0) <= 100
    assert parse_retry_after(email.utils.formatdate(0, usegmt=True)) == 0
    for text in ("", "soon", "-1", "nan", "1e9", "9" * 400):
        assert parse_retry_after(text) is None


def test_waits_grow_and_are_jittered() -> None:
    policy = RetryPolicy(base=1, cap=8)
    waits = [[policy.wait(n, None) for _ in range(200)] for n in (0, 2, 1000)]
    for found, most in zip(waits, (1, 4, 8), strict=True):
        assert 0 <= min(found) < 0.2 * most < 0.8 * most < max(found) <= most
    assert all(5 <= policy.wait(0, 5) <= 6 for _ in range(50))


def test_problems_with_odd_parts_are_read() -> None:
    """Whatever a gateway makes of a problem: the error is still one of ours."""
    for more in ({"errors": "x"}, {"errors": [1, {"pointer": None}]}, {"retry_after_ms": "soon"}, {"limit": True}):
        fault = problem(503, "not-ready", **more)
        error = from_response(503, {}, fault.body)
        assert type(error) is NotReady
        assert error.retry_after is None

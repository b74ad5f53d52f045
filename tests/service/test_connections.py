"""What a connection may do before it is a request: heads are bounded in bytes and in time, and so is the rest."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from starlette.responses import Response, StreamingResponse

from service import telemetry
from service.connections import GuardedProtocol, open_files
from service.shared_port import SharedPort
from tests.service.conftest import ServiceProcess, free_port, until

HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\n"


class Hasty(GuardedProtocol):
    """The same, in a hurry."""

    patience = 0.5
    most_connections = 8


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that answers with the number of bytes, and lets bodies be."""

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        count = 0
        if scope["path"] != "/at-once":
            more = True
            while more:
                message = await receive()
                count += len(message.get("body", b""))
                more = message.get("more_body", False)
        headers = [(b"content-length", str(len(str(count))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": str(count).encode()})

    number = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, port=number, log_level="critical", lifespan="off", http=Hasty, timeout_keep_alive=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield number
    server.should_exit = True
    thread.join()


def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back until the other side closes, or for four seconds."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=4) as sock:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while data := sock.recv(65536):
                heard += data
    return heard


def test_requests_go_through(port: int) -> None:
    large = HEAD + b"X-Note: " + b"a" * 40_000 + b"\r\nContent-Length: 300000\r\nConnection: close\r\n\r\n"
    assert talk(port, large, b"b" * 300_000).endswith(b"\r\n\r\n300000")
    one = HEAD + b"Content-Length: 3\r\n\r\nabc"
    last = HEAD + b"Content-Length: 4\r\nConnection: close\r\n\r\nabcd"
    heard = talk(port, one + one + last)
    assert heard.count(b"200 OK") == 3
    assert heard.endswith(b"4")
    parts = [one[i : i + 7] for i in range(0, len(one), 7)] + [last]
    assert talk(port, *parts, pause=0.01).count(b"200 OK") == 2


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"POST /", b"a" * 8192),
        (HEAD + b"X-Long: ", b"a" * 8192),
        (HEAD, b"X-Many: aaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 256),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nb\r\n0\r\n", b"X-Trailer: aaaaaaaaaaaaaaaaaa\r\n" * 256),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 8192),
    ],
    ids=["path", "value", "headers", "trailers", "extension"],
)
def test_a_head_without_end_is_refused_soon(port: int, first: bytes, more: bytes) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=4) as sock:
        sock.sendall(first)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < 50_000_000:
                sock.sendall(more)
                sent += len(more)
        assert sent < 20_000_000  # what lies in the sockets' buffers was sent, not read
    # Where an answer has not begun it is said why; a small head is heard as ever.
    assert b"200 OK" in talk(port, HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")


def test_it_is_said_why(port: int) -> None:
    assert talk(port, HEAD + b"X-Long: " + b"a" * 100_000, b"a" * 100_000, pause=0.2).startswith(b"HTTP/1.1 431 ")


def test_a_head_that_does_not_end_in_time_is_408(port: int) -> None:
    began = time.monotonic()
    assert talk(port, b"GET / HT").startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 2
    # A byte now and then does not help, on a connection that has been used before neither.
    used = HEAD + b"Content-Length: 0\r\n\r\n"
    assert b"HTTP/1.1 408 " in talk(port, used, *[b"G", b"E", b"T", b" ", b"/", b" ", b"H"], pause=0.2)
    # Who has said nothing is not told that they are late.
    began = time.monotonic()
    assert talk(port) == b""
    assert 1 < time.monotonic() - began < 4


def test_the_rest_of_a_body_that_was_answered_is_not_waited_for(port: int) -> None:
    slow = b"POST /at-once HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    began = time.monotonic()
    heard = talk(port, slow, *[b"a"] * 12, pause=0.2)
    assert b"200 OK" in heard
    assert time.monotonic() - began < 4


def test_more_connections_than_there_are_places_are_told_so(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(0.2)
        counted = telemetry.REFUSED.labels("connections")
        before = counted._value.get()
        heard = talk(port)
        assert heard.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in heard
        assert heard.endswith(b"\r\n\r\nToo many connections.")
        assert counted._value.get() == before + 1
    time.sleep(0.2)
    assert b"200 OK" in talk(port, HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")


def test_the_service_has_these_bounds(tiny_service: ServiceProcess) -> None:
    heard = talk(
        tiny_service.port, b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 400_000, b"a" * 400_000, pause=0.3
    )
    assert heard.startswith(b"HTTP/1.1 431 ")


def test_without_a_limit_on_files_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((resource.RLIM_INFINITY, 1 << 20), (1024, 1024), (1 << 30, 1 << 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert open_files() == most


def test_an_answered_connection_that_says_nothing_more_of_sense_is_closed(port: int) -> None:
    refused = b"POST /at-once HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
    for parts in ((refused, b"hello"), (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"\r\n")):
        began = time.monotonic()
        assert b"200 OK" in talk(port, *parts, pause=0.2)
        assert 2 < time.monotonic() - began < 3.8  # as any that says nothing; nobody waits so long for an answer
    # A body that came late is no excuse for the next head.
    assert b"HTTP/1.1 408 " in talk(port, refused, b"hello", b"GET / HT", pause=0.2)


class Impatient(GuardedProtocol):
    """The same, and soon tired of a client that does not read."""

    patience_to_write = 0.8


LARGE = 6 << 20


@pytest.fixture(scope="module")
def writing() -> Iterator[uvicorn.Server]:
    """A server that has much to say."""

    async def pieces(path: str) -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 16_384
            await asyncio.sleep(0.001)
            # Some lies in the transport, and not enough for it to say so.
            waiting = [one.transport.get_write_buffer_size() for one in server.server_state.connections]
            if path == "/little" and any(waiting):
                return

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        path = scope["path"]
        answer = StreamingResponse(pieces(path)) if path in ("/stream", "/little") else Response(b"x" * LARGE)
        await answer(scope, receive, send)

    config = uvicorn.Config(app, port=free_port(), log_level="critical", lifespan="off", http=Impatient)
    config.timeout_keep_alive = config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("path", ["/large", "/large-and-close", "/stream", "/little"])
def test_a_client_that_does_not_read_is_cut_off(writing: uvicorn.Server, path: str) -> None:
    close = b"Connection: close\r\n" if path.endswith("close") else b""
    with socket.create_connection(("127.0.0.1", writing.config.port)) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path.encode(), close))
        until(lambda: bool(writing.server_state.connections))
        until(lambda: not writing.server_state.connections, 8)
        until(lambda: not writing.server_state.tasks)


def test_a_client_that_reads_slowly_is_not(writing: uvicorn.Server) -> None:
    heard = 0
    with socket.create_connection(("127.0.0.1", writing.config.port), timeout=10) as sock:
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        end = time.monotonic() + 4 * Impatient.patience_to_write
        while data := sock.recv(100_000):
            heard += len(data)
            # In that time the kernel has room for the transport's next bytes once or twice.
            time.sleep(0.1 if time.monotonic() < end else 0)
    assert heard > LARGE


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_who_waits_at_a_shared_port_that_is_left_is_answered(kind: str) -> None:
    loops = pytest.importorskip(kind)

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        config = uvicorn.Config(app, port=free_port(), log_level="critical", lifespan="off", http=GuardedProtocol)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready, shared = True, SharedPort("127.0.0.1", free_port())
        keeping = asyncio.create_task(shared.keep(server, lambda: ready))
        while shared._listener is None:
            await asyncio.sleep(0.01)
        ready = False
        # The loop runs no other step before it leaves: the kernel alone has taken these.
        socks = [socket.create_connection(("127.0.0.1", shared._port)) for _ in range(5)]
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await shared._leave(server)
        for sock in socks:
            assert b" 204 " in await asyncio.to_thread(sock.recv, 1000)
            sock.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", shared._port))
        keeping.cancel()
        server.should_exit = True
        await serving

    loops.run(scenario())

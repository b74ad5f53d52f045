"""A closed-loop HTTP client that costs little itself: requests made beforehand, keep-alive, one parse a reply."""

from __future__ import annotations

import asyncio
import math
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LONGEST_SECONDS = 60.0
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """What a closed loop saw: seconds, latency of each reply (s), CPU seconds of client and server, refusals."""

    seconds: float
    latencies: list[float]
    client_cpu_seconds: float
    server_cpu_seconds: float
    refused: int = 0

    @property
    def rate(self) -> float:
        """Replies per second."""
        return len(self.latencies) / self.seconds

    @property
    def client_cores(self) -> float:
        """Cores that the client itself kept busy."""
        return self.client_cpu_seconds / self.seconds

    def percentile(self, share: float) -> float:
        """Latency (s) that `share` of the replies did not pass."""
        return percentile(self.latencies, share)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that `share` of them (0 to 1) do not pass; `nan` where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


class Refused(Exception):
    """The service answered with another status than 200."""


@dataclass(frozen=True)
class Reply:
    """One answer: its status, its head as it came, its body."""

    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """A header's value, empty where it is missing."""
        found = re.search(rb"\r\n" + re.escape(name.encode()) + rb": *([^\r]*)", self.head, re.IGNORECASE)
        return found[1].decode("latin-1").strip() if found else ""


def post(path: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of one POST request."""
    fields = {"Host": "bench", "Content-Type": content_type, "Content-Length": len(body), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def closed_loop(
    port: int,
    next_request: Callable[[], bytes],
    concurrency: int,
    seconds: float,
    server_seconds: Callable[[], float],
    *,
    patient: bool = False,
) -> Load:
    """Keep `concurrency` requests in flight; counts from when each connection has had its first reply.

    Lasts some seconds, and on a slow machine longer: until there are three replies for each connection. Time and CPU
    seconds are taken from reply to reply, since a server that answers in bursts is else charged for a burst that the
    end of the window cuts off. `server_seconds`, the CPU time that the server has used, is asked for after every reply.
    Who is `patient` and answered 429 or 503 asks again when Retry-After says; its latency counts from the first time.

    Raises:
        Refused: a status other than 200 (and than those, where patient).
    """
    latencies: list[float] = []
    last = (0.0, 0.0, 0.0)
    warm = refused = 0
    all_warm, enough = asyncio.Event(), asyncio.Event()

    def stand() -> tuple[float, float, float]:
        return time.perf_counter(), _own_cpu(), server_seconds()

    async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        nonlocal refused
        while patient and not enough.is_set():
            reply = await exchange(reader, writer, request)
            if reply.status not in (429, 503):
                return _check(reply)
            refused += 1
            wait = reply.header("retry-after")
            await asyncio.sleep(float(wait) if wait.isdigit() else 1.0)
        if not patient:
            _check(await exchange(reader, writer, request))

    async def worker() -> None:
        nonlocal warm, last
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        try:
            await asked(reader, writer, next_request())
            warm += 1
            if warm == concurrency:
                all_warm.set()
            while not enough.is_set():
                began = time.perf_counter()
                await asked(reader, writer, next_request())
                if all_warm.is_set() and not enough.is_set():
                    latencies.append(time.perf_counter() - began)
                    last = stand()
        finally:
            writer.close()

    async def watch() -> tuple[float, float, float]:
        await all_warm.wait()
        first = stand()
        await asyncio.sleep(seconds)
        while len(latencies) < 3 * concurrency and time.perf_counter() - first[0] < _LONGEST_SECONDS:
            await asyncio.sleep(0.05)
        enough.set()
        lasted, spent, server_spent = (end - begin for begin, end in zip(first, last, strict=True))
        return lasted, spent, server_spent

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        lasted, spent, server_spent = await watcher
    finally:
        watcher.cancel()
    return Load(lasted, latencies, spent, server_spent, refused)


async def fetch(port: int, path: str) -> bytes:
    """Body of one GET.

    Raises:
        Refused: a status other than 200.
        OSError: nobody listens.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        return await _exchange(reader, writer, f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    finally:
        writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply:
    """Send one request over a connection and read its answer, whatever the status.

    Raises:
        OSError: the connection broke.
        asyncio.IncompleteReadError: it was closed before the answer was complete.
    """
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    body = await reader.readexactly(int(length[1])) if length else await _chunks(reader, head)
    return Reply(int(head[9:12]), head, body)


async def _chunks(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """A body of no stated length: in chunks, or none."""
    parts: list[bytes] = []
    if b"transfer-encoding: chunked" in head.lower():
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    return b"".join(parts)


async def ask(port: int, request: bytes, seconds: float = 60.0) -> Reply:
    """Send one request over a connection of its own.

    Raises:
        OSError, asyncio.IncompleteReadError: the connection broke.
        TimeoutError: no answer within `seconds`.
    """

    async def once() -> Reply:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        try:
            return await exchange(reader, writer, request)
        finally:
            writer.close()

    return await asyncio.wait_for(once(), seconds)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    reply = await exchange(reader, writer, request)
    _check(reply)
    return reply.body


def _check(reply: Reply) -> None:
    if reply.status != 200:
        raise Refused(f"{reply.head[:60]!r} {reply.body[:300]!r}")


def cycle(requests: Sequence[bytes]) -> Callable[[], bytes]:
    """Hand out requests in turn, from the start again after the last."""
    position = -1

    def following() -> bytes:
        nonlocal position
        position = (position + 1) % len(requests)
        return requests[position]

    return following


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

"""A closed-loop HTTP client that costs little itself: requests made beforehand, keep-alive, one parse a reply."""

from __future__ import annotations

import asyncio
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.machine import process_seconds

_LONGEST_SECONDS = 60.0
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """What a closed loop saw: seconds it lasted, latency of each reply (s), CPU seconds of client and server."""

    seconds: float
    latencies: list[float]
    client_cpu_seconds: float
    server_cpu_seconds: float

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
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Refused(Exception):
    """The service answered with another status than 200."""


def post(path: str, body: bytes, content_type: str) -> bytes:
    """The bytes of one POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def closed_loop(
    port: int, next_request: Callable[[], bytes], concurrency: int, seconds: float, server_pid: int
) -> Load:
    """Keep `concurrency` requests in flight; counts from when each connection has had its first reply.

    Lasts some seconds, and on a slow machine longer: until there are three replies for each connection. Time and CPU
    seconds are taken from reply to reply, since a server that answers in bursts is else charged for a burst that the
    end of the window cuts off.

    Raises:
        Refused: a status other than 200.
    """
    latencies: list[float] = []
    last = (0.0, 0.0, 0.0)
    warm = 0
    all_warm, enough = asyncio.Event(), asyncio.Event()

    def stand() -> tuple[float, float, float]:
        return time.perf_counter(), _own_cpu(), process_seconds(server_pid)

    async def worker() -> None:
        nonlocal warm, last
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        try:
            await _exchange(reader, writer, next_request())
            warm += 1
            if warm == concurrency:
                all_warm.set()
            while not enough.is_set():
                began = time.perf_counter()
                await _exchange(reader, writer, next_request())
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
    return Load(lasted, latencies, spent, server_spent)


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


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    body = await reader.readexactly(int(length[1])) if length else b""
    if head[9:12] != b"200":
        raise Refused(f"{head[:60]!r} {body[:300]!r}")
    return body


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

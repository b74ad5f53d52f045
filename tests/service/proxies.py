"""Small TCP proxies for tests: one that delays, and one that spreads connections over replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence


class Proxy:
    """Pipes each connection to one of the backends, the next one where a connection is refused.

    Attributes:
        delay: seconds that each piece of data from the backend is held back.
    """

    def __init__(self, backends: Sequence[int]) -> None:
        self.delay = 0.0
        self.port = 0
        self._backends = tuple(backends)
        self._turns = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        first = next(self._turns)
        for offset in range(len(self._backends)):
            with contextlib.suppress(OSError):
                port = self._backends[(first + offset) % len(self._backends)]
                return await asyncio.open_connection("127.0.0.1", port)
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = await self._connect()
        if backend is None:
            writer.close()
            return
        await asyncio.gather(self._pipe(reader, backend[1], 0.0), self._pipe(backend[0], writer, None))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float | None) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay if delay is None else delay)
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()


@contextlib.contextmanager
def proxy(*backends: int) -> Iterator[Proxy]:
    """A running proxy to the ports."""
    found = Proxy(backends)
    found.start()
    try:
        yield found
    finally:
        found.stop()

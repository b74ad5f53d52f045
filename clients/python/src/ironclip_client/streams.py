"""Probes as they go on: started, followed over broken lines, and cancelled when nobody looks any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx

from ironclip_client import calls
from ironclip_client.errors import IronclipError
from ironclip_client.following import Following
from ironclip_client.probes import ProbeEvent, ProbeResult, ProbeStanding
from ironclip_client.wire import Call

if TYPE_CHECKING:
    from typing_extensions import Self

# To cancel a probe that nobody follows any more; where that fails, its own budget ends it.
_CANCEL = {"timeout": 5.0}


class _Stream:
    def __init__(self, following: Following, start: Call[ProbeStanding] | None) -> None:
        self._following, self._start, self._within = following, start, False
        self._cancels = start is not None

    @property
    def id(self) -> str:
        """The probe's id; "" until it is started."""
        return self._following.id

    def __repr__(self) -> str:
        state = "ended" if self._following.ended else "running" if self.id else "not started"
        return f"<{type(self).__name__} {self.id or '-'}, {state}>"

    def _starting(self) -> Call[ProbeStanding] | None:
        start, self._start = self._start, None
        if start is None:
            return None
        self._following.check()
        return replace(start, timeout=self._following.left)

    def _cancelling(self) -> Call[None] | None:
        if not self._cancels or not self.id or self._following.ended:
            return None
        self._cancels = False
        return calls.probe_cancel(self.id, _CANCEL)


class ProbeStream(_Stream):
    """A probe as it goes on: iterate over its events, best in a `with`.

    A probe that this stream has started is cancelled when the `with` is left before its end; without a `with`, when
    the iteration is.
    """

    def __init__(
        self,
        http: httpx.Client,
        send: Callable[[Call[Any]], Any],
        following: Following,
        start: Call[ProbeStanding] | None,
    ) -> None:
        super().__init__(following, start)
        self._http, self._send = http, send

    def start(self) -> None:
        """Start the probe, if it is not started yet."""
        if (start := self._starting()) is not None:
            self._following.id = self._send(start).id

    def close(self) -> None:
        """Cancel the probe, if this stream has started it and it has not ended."""
        if (cancel := self._cancelling()) is not None:
            with contextlib.suppress(IronclipError):
                self._send(cancel)

    def __enter__(self) -> Self:
        self._within = True
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[ProbeEvent]:
        """Events until the probe has ended.

        Raises:
            IronclipError: the probe failed, its time is up, or its events cannot be had.
        """
        self.start()
        try:
            while not self._following.ended:
                broken: Exception | None = None
                try:
                    yield from self._events()
                except (httpx.HTTPError, IronclipError) as error:
                    if self._following.ended:
                        raise
                    broken = error
                if not self._following.ended:
                    time.sleep(self._following.broken(broken))
        finally:
            if not self._within:
                self.close()

    def result(self) -> ProbeResult:
        """Wait for the end and return what was found; raises as iterating does, and ProbeCancelled."""
        for _ in self:
            pass
        return self._following.answer()

    def _events(self) -> Iterator[ProbeEvent]:
        with self._http.stream(**self._following.request()) as response:
            self._following.answered(response, b"" if response.status_code == 200 else response.read())
            for part in response.iter_bytes():
                for event in self._following.feed(part):
                    yield event
                    if event.ends:
                        return


class AsyncProbeStream(_Stream):
    """A probe as it goes on: iterate over its events, best in an `async with`.

    A probe that this stream has started is cancelled when the `async with` is left before its end; without one, when
    the iteration is.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        send: Callable[[Call[Any]], Awaitable[Any]],
        following: Following,
        start: Call[ProbeStanding] | None,
    ) -> None:
        super().__init__(following, start)
        self._http, self._send = http, send

    async def start(self) -> None:
        """Start the probe, if it is not started yet."""
        if (start := self._starting()) is not None:
            self._following.id = (await self._send(start)).id

    async def close(self) -> None:
        """Cancel the probe, if this stream has started it and it has not ended."""
        if (cancel := self._cancelling()) is not None:
            with contextlib.suppress(IronclipError):
                await self._send(cancel)

    async def __aenter__(self) -> Self:
        self._within = True
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[ProbeEvent]:
        """As `ProbeStream.__iter__`."""
        await self.start()
        try:
            while not self._following.ended:
                broken: Exception | None = None
                try:
                    async with self._http.stream(**self._following.request()) as response:
                        body = b"" if response.status_code == 200 else await response.aread()
                        self._following.answered(response, body)
                        async for part in response.aiter_bytes():
                            for event in self._following.feed(part):
                                yield event
                            if self._following.ended:
                                break
                except (httpx.HTTPError, IronclipError) as error:
                    if self._following.ended:
                        raise
                    broken = error
                if not self._following.ended:
                    await asyncio.sleep(self._following.broken(broken))
        finally:
            if not self._within:
                await self.close()

    async def result(self) -> ProbeResult:
        """As `ProbeStream.result`."""
        async for _ in self:
            pass
        return self._following.answer()

"""The way to Redis: short timeouts, and a circuit breaker, so that a Redis that is down or slow costs nothing.

While the circuit is open no request waits for Redis at all; a task in the background pings until it answers as soon as
a request would need it to.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, MaxConnectionsError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service import telemetry

T = TypeVar("T")

# Failures in a row that open the circuit, and the seconds between pings while it is open (doubling).
_FAILURES = 3
_FIRST_PING, _LAST_PING = 0.25, 5.0
# A circuit that is opened again within so many seconds goes on with the pauses where they were.
_SOON = 30.0
# How long it may take to connect, with the first ping on the way.
_CONNECT_SECONDS = 1.0
# After so many seconds in which nobody asked Redis anything it is pinged, so that one that is gone shows.
_QUIET = 5.0
# Calls under way at once; what comes on top waits for its turn, for as long as it would wait for an answer.
_CALLS = 32


class RedisUnavailable(Exception):
    """Redis did not answer in time, or is being left alone; the caller goes on without it."""


class RedisRefused(RedisUnavailable):
    """Redis answered that it will not do this.

    Attributes:
        wrong_type: something else is kept under the key than the command is for.
    """

    def __init__(self, error: ResponseError) -> None:
        super().__init__(type(error).__name__)
        # In a pipeline the command stands before the reason.
        self.wrong_type = str(error).rsplit("caused error: ", 1)[-1].startswith("WRONGTYPE")


def _reason(error: BaseException) -> str:
    """Why Redis cannot be used, from a closed set: texts of errors may hold what was sent."""
    if isinstance(error, (AuthenticationError, NoPermissionError)):
        return "wrong user or password: IRONCLIP_REDIS_URL"
    if str(error).startswith("DENIED Redis is running in protected mode"):
        return "Redis is in protected mode: give it a password, or protected-mode no where nobody else reaches it"
    cause = error.__cause__ or error.__context__ or error
    if isinstance(error, (asyncio.TimeoutError, RedisTimeoutError)):
        return "no answer in time"
    return "connection refused" if isinstance(cause, ConnectionRefusedError) else type(error).__name__


def _forget_late_lookups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what nobody caught, but for a name that could not be looked up.

    Where the name server takes longer to say so than a ping may take, nobody waits for it any more: the ping has told
    that there was no answer, and each of those behind it would be one more error in the log.
    """
    if not isinstance(context.get("exception"), socket.gaierror):
        loop.default_exception_handler(context)


class RedisLink:
    """One replica's connection pool to Redis.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        timeout: seconds that one call may take; an answer in this time, and no slower one, is a sign of health.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.timeout = timeout
        self._redis: Redis = Redis.from_url(
            url,
            socket_timeout=max(timeout, _CONNECT_SECONDS),
            socket_connect_timeout=max(timeout, _CONNECT_SECONDS),
            retry=Retry(NoBackoff(), 0),
            max_connections=2 * _CALLS,
        )
        told = self._redis.connection_pool.connection_kwargs
        self._address = str(told.get("path") or f"{told.get('host', 'localhost')}:{told.get('port', 6379)}")
        self._why = ""  # the last ping did not come back
        self._turns = asyncio.Semaphore(_CALLS)
        self._failures = 0
        self._open = True  # until the first ping has come back
        self._closed_at = float("-inf")
        self._pause = _FIRST_PING  # before the next ping
        self._pinger: asyncio.Task[None] | None = None
        self._heard = float("-inf")  # when Redis last answered anything
        self._looker: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()

    async def start(self) -> None:
        """Try to reach Redis once; if it is not there, go on and keep trying in the background."""
        telemetry.REDIS_UP.set(0)
        asyncio.get_running_loop().set_exception_handler(_forget_late_lookups)
        if await self._ping():
            self._log.info("redis answers", address=self._address)
        else:
            self._log.warning("redis unreachable, serving without it", address=self._address, reason=self._why)
            self._trip()
        self._looker = asyncio.create_task(self._look_when_quiet())

    async def close(self) -> None:
        """Stop pinging and close the connections."""
        for task in (self._pinger, self._looker):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    @property
    def available(self) -> bool:
        """Whether calls are let through."""
        return not self._open

    async def call(self, action: Callable[[Redis], Awaitable[T]], *, timeout: float | None = None) -> T:
        """Run one action on the client, within the timeout.

        Raises:
            RedisUnavailable: the circuit is open, or the action failed or took too long.
            RedisRefused: Redis is well, and answered with an error.
        """
        if self._open:
            raise RedisUnavailable("circuit open")
        limit = timeout or self.timeout
        began = float("inf")

        async def take_turn() -> T:
            nonlocal began
            async with self._turns:
                began = time.monotonic()
                return await action(self._redis)

        try:
            result = await asyncio.wait_for(take_turn(), limit)
        except ResponseError as error:
            self._answered(time.monotonic() - began)
            telemetry.REDIS_ERRORS.labels("refused").inc()
            raise RedisRefused(error) from error
        except (RedisError, OSError, asyncio.TimeoutError, RuntimeError) as error:
            # A queue on this side says nothing about Redis: only what it had time to answer counts against it.
            late = isinstance(error, asyncio.TimeoutError) and time.monotonic() - began < limit / 2
            if late or isinstance(error, MaxConnectionsError):
                telemetry.REDIS_ERRORS.labels("busy").inc()
            else:
                self._failed(error)
            raise RedisUnavailable(type(error).__name__) from error
        self._answered(time.monotonic() - began)
        return result

    def _answered(self, seconds: float) -> None:
        self._heard = time.monotonic()
        # Calls that may take longer would hide that all the others come to nothing.
        if seconds <= self.timeout:
            self._failures = 0

    def _failed(self, error: Exception) -> None:
        slow = "Timeout" in type(error).__name__
        telemetry.REDIS_ERRORS.labels("timeout" if slow else "error").inc()
        self._failures += 1
        if self._failures >= _FAILURES and not self._open:
            self._log.warning("redis failing, serving without it", reason=type(error).__name__)
            self._trip()

    def _trip(self) -> None:
        self._open = True
        telemetry.REDIS_UP.set(0)
        soon = time.monotonic() - self._closed_at < _SOON
        self._pause = min(2 * self._pause, _LAST_PING) if soon else _FIRST_PING
        if self._pinger is None or self._pinger.done():
            self._pinger = asyncio.create_task(self._ping_until_up())

    async def _look_when_quiet(self) -> None:
        while True:
            await asyncio.sleep(_QUIET)
            if self._open or time.monotonic() - self._heard < _QUIET:
                continue
            try:
                await asyncio.wait_for(self._redis.ping(), _CONNECT_SECONDS)
                self._heard = time.monotonic()
            except (RedisError, OSError, asyncio.TimeoutError, RuntimeError) as error:
                if not self._open:
                    self._log.warning("redis is gone, serving without it", address=self._address, reason=_reason(error))
                    self._trip()

    async def _ping_until_up(self) -> None:
        while True:
            await asyncio.sleep(self._pause)
            before = self._why
            if await self._ping():
                self._log.info("redis answers again", address=self._address)
                return
            if self._why != before:
                self._log.warning("redis still unreachable", address=self._address, reason=self._why)
            self._pause = min(2 * self._pause, _LAST_PING)

    async def _ping(self) -> bool:
        """Close the circuit if Redis answers within the timeout of a call; whether it did."""
        try:
            await asyncio.wait_for(self._redis.ping(), _CONNECT_SECONDS)
            # The first may have had to connect; this one finds a connection, as calls mostly do.
            await asyncio.wait_for(self._redis.ping(), self.timeout)
        except (RedisError, OSError, asyncio.TimeoutError, RuntimeError) as error:
            self._why = _reason(error)
            return False
        self._open, self._failures, self._heard = False, 0, time.monotonic()
        self._closed_at = self._heard
        telemetry.REDIS_UP.set(1)
        return True

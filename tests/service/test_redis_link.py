"""The circuit breaker before a real Redis that is slow: open for as long as it is, and closed soon afterwards."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from prometheus_client import REGISTRY

from service.redis_link import RedisLink, RedisUnavailable
from tests.service.conftest import RedisServer
from tests.service.proxies import Proxy, proxy

pytestmark = pytest.mark.anyio
SLOW = 0.2  # and yet a connection is made within the second that it may take


@pytest.fixture
def line(redis_server: RedisServer) -> Iterator[Proxy]:
    """The way to Redis, whose answers can be held back."""
    with proxy(redis_server.port) as found:
        yield found


@pytest.fixture
async def link(line: Proxy) -> AsyncIterator[RedisLink]:
    """A link that waits less long for an answer than the proxy holds it back when it is slow."""
    found = RedisLink(f"redis://127.0.0.1:{line.port}/0", 0.1)
    await found.start()
    await until(lambda: found.available)
    yield found
    await found.close()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


async def asked(link: RedisLink, timeout: float | None = None) -> bool:
    """Whether a look-up got its answer."""
    try:
        await link.call(lambda redis: redis.get("key"), timeout=timeout)
    except RedisUnavailable:
        return False
    return True


async def tripped(link: RedisLink, line: Proxy) -> None:
    """Make Redis slow, and ask until it is left alone."""
    line.delay = SLOW
    while link.available:
        await asked(link)


async def test_a_redis_that_lets_nobody_in_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """The answer of a Redis in protected mode to whoever comes from another machine, after which it hangs up."""

    async def deny(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-DENIED Redis is running in protected mode because protected mode is enabled.\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(deny, "127.0.0.1", 0)
    found = RedisLink(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", 0.1)
    try:
        await found.start()
        assert not found.available
        assert "protected mode: give it a password" in "".join(capsys.readouterr())
    finally:
        await found.close()
        server.close()


async def test_only_a_name_looked_up_too_late_is_forgotten(link: RedisLink, caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody waited for is logged, unless a name server said too late that it knows no such name."""
    for error in (socket.gaierror(-3, "Temporary failure in name resolution"), ValueError("of something else")):
        lost = asyncio.get_running_loop().create_future()
        lost.set_exception(error)
        del lost
        gc.collect()
    assert "of something else" in caplog.text
    assert "name resolution" not in caplog.text


async def test_a_redis_that_nobody_asks_is_missed_all_the_same(line: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the metric would say that it is there until somebody comes."""
    monkeypatch.setattr("service.redis_link._QUIET", 0.1)
    found = RedisLink(f"redis://127.0.0.1:{line.port}/0", 0.1)
    await found.start()
    try:
        await until(lambda: found.available)
        assert REGISTRY.get_sample_value("ironclip_redis_up") == 1
        line.delay = 5  # longer than a ping may take
        await until(lambda: not found.available)
        assert REGISTRY.get_sample_value("ironclip_redis_up") == 0
        line.delay = 0
        await until(lambda: found.available)
    finally:
        await found.close()


async def test_the_circuit_stays_open_while_redis_is_slow_and_closes_after(link: RedisLink, line: Proxy) -> None:
    await tripped(link, line)
    end = time.monotonic() + 3  # pings come after 0.25, 0.5 and 1 s, each answered in less than a second
    while time.monotonic() < end:
        assert not link.available
        await asyncio.sleep(0.01)
    line.delay = 0
    await until(lambda: link.available)
    assert await asked(link)


async def test_calls_that_may_take_longer_do_not_hide_that_look_ups_fail(link: RedisLink, line: Proxy) -> None:
    """A service writes to its caches with another timeout, beside look-ups that all come to nothing."""
    line.delay = SLOW
    for _ in range(3):
        assert not await asked(link)
        await asked(link, timeout=5)
    assert not link.available


async def test_quick_answers_are_proof_of_health(link: RedisLink, line: Proxy) -> None:
    link.timeout = 0.5  # for a busy machine too
    for _ in range(2):  # never three failures in a row
        line.delay = 1
        assert not await asked(link)
        assert not await asked(link)
        line.delay = 0
        assert await asked(link, timeout=5)
    assert link.available


async def test_a_circuit_that_opens_again_soon_is_tried_less_often(link: RedisLink, line: Proxy) -> None:
    await tripped(link, line)
    line.delay = 0
    await until(lambda: link.available)
    await tripped(link, line)
    line.delay = 0
    opened = time.monotonic()
    await until(lambda: link.available)
    assert time.monotonic() - opened > 0.45  # 0.25 the first time

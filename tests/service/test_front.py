"""What every request passes: its body in whatever pieces it comes, its id and its line, and nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.responses import StreamingResponse

from service import telemetry
from service.app import create_app
from service.bodies import Bodies, Body
from service.exchange import Exchange
from service.rate_limits import Meter
from service.request_ids import new_request_id
from service.settings import Settings
from tests.service.conftest import make_key, picture, write_keys

HEADERS = [(b"content-type", b"image/png")]
ROOM = 60_000
REMEMBERED = ("ironclip_cache_total", {"cache": "answers", "result": "hit"})
FORKED = """
import os
from service.rate_limits import Meter
from service.request_ids import new_request_id
new_request_id()
child = os.fork()
if child:
    os.waitpid(child, 0)
os.write(1, (" ".join(new_request_id() for _ in range(20)) + chr(10)).encode())
"""


class Answer:
    """What an app sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def send(self, message: Any) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]


@asynccontextmanager
async def running(artifact: Path, folder: Path, **more: Any) -> AsyncIterator[FastAPI]:
    settings = {"state_dir": folder, "probes": False, "max_body_bytes": ROOM, "max_held_bytes": ROOM, **more}
    app = create_app(Settings(encoders={"tiny": str(artifact)}, **settings))
    async with app.router.lifespan_context(app):
        deadline = time.monotonic() + 60
        while app.state.service.not_ready() is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        yield app


def pieces(body: bytes, count: int, pause: float | None) -> Callable[[], Awaitable[dict[str, Any]]]:
    """A `receive` that gives the body in so many pieces, each there at once (None) or after a pause, and then waits."""
    size = max(1, -(-len(body) // count))
    left = [body[at : at + size] for at in range(0, len(body), size)] or [b""]

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(600)
        if pause is not None:
            await asyncio.sleep(pause)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


async def ask(
    app: FastAPI, receive: Any, headers: list[tuple[bytes, bytes]] = HEADERS, method: str = "POST", path: str = "/embed"
) -> Answer:
    answer = Answer()
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "root_path": "", "http_version": "1.1"}
    await app(scope, receive, answer.send)
    return answer


def test_a_body_is_the_same_in_whatever_pieces_it_comes(tiny_artifact: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_artifact, tmp_path) as app:
            body = picture(9100)
            whole = [await ask(app, pieces(body, 1, None)) for _ in range(3)][-1]
            assert (whole.status, b"hit" in whole.headers[b"cache-status"]) == (200, True)
            for number, (count, pause) in enumerate(itertools.product((1, 2, 7), (None, 0.0, 0.01))):
                before = REGISTRY.get_sample_value(*REMEMBERED) or 0
                answer = await ask(app, pieces(body, count, pause))
                assert (answer.status, answer.body) == (200, whole.body)
                assert REGISTRY.get_sample_value(*REMEMBERED) == before + 1
                new = picture(9200 + number)  # nobody has asked for it: the routes read what was read before them
                assert (await ask(app, pieces(new, count, pause))).status == 200

    asyncio.run(scenario())


def test_a_body_that_stops_is_given_up_and_its_room_is_there_again(tiny_artifact: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_artifact, tmp_path) as app:
            part = b"x" * (ROOM // 2)

            def stopping() -> Any:
                told = False

                async def receive() -> dict[str, Any]:
                    nonlocal told
                    if told:
                        await asyncio.sleep(600)
                    told = True
                    return {"type": "http.request", "body": part, "more_body": True}

                return receive

            for _ in range(3):  # had one kept its room, the second would be refused
                late = await ask(app, stopping(), [*HEADERS, (b"x-request-timeout-ms", b"60")])
                assert (late.status, b"deadline-exceeded" in late.body) == (504, True)
                assert b"had not arrived in full within 60 ms" in late.body
            for _ in range(3):
                before = REGISTRY.get_sample_value("ironclip_requests_in_flight")
                task = asyncio.create_task(ask(app, stopping()))
                await asyncio.sleep(0.05)
                assert REGISTRY.get_sample_value("ironclip_requests_in_flight") == (before or 0) + 1
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert REGISTRY.get_sample_value("ironclip_requests_in_flight") == before
            assert (await ask(app, pieces(picture(9102), 1, None))).status == 200

    asyncio.run(scenario())


def test_nothing_of_a_request_waits_for_the_collector(tiny_artifact: Path, tmp_path: Path) -> None:
    """A circle would keep the body of each in memory, pictures of many megabytes, until the collector comes by."""

    keys = write_keys(tmp_path / "keys.toml", {"asks": make_key("asks", "acme", "infer", points_per_minute=60_000)})
    key = [(b"x-api-key", keys["asks"].encode())]

    async def scenario() -> list[int]:
        async with running(tiny_artifact, tmp_path, keys_file=tmp_path / "keys.toml") as app:
            body = picture(9103)
            kinds: list[Callable[[], Awaitable[Answer]]] = [
                lambda: ask(app, pieces(body, 1, None), [*HEADERS, *key]),
                lambda: ask(app, pieces(body, 2, 0.0), [*HEADERS, *key]),
                lambda: ask(app, pieces(body, 1, None)),  # no key
                lambda: ask(app, pieces(b"", 1, None), key, "GET", "/metrics"),  # not with this key
                lambda: ask(app, pieces(b"no picture", 1, None), [*HEADERS, *key]),
                lambda: ask(app, pieces(b"x" * (ROOM + 1), 1, None), [*HEADERS, *key]),
                lambda: ask(app, pieces(b"", 1, None), key, "GET", "/models"),
                lambda: ask(app, pieces(b"", 1, None), [], "HEAD", "/readyz"),
                lambda: ask(app, pieces(b"", 1, None), key, "GET", "/nowhere"),
            ]
            # Once before: what is made once for all is made.
            assert [(await kind()).status for kind in kinds] == [200, 200, 401, 403, 422, 413, 200, 200, 404]
            left = []
            for kind in kinds:
                gc.collect()
                gc.disable()
                try:
                    for _ in range(5):
                        await kind()
                    await asyncio.sleep(0.02)  # what was cancelled ends
                    left.append(sum(isinstance(one, Exchange) for one in gc.get_objects()))
                finally:
                    gc.enable()
            return left

    assert asyncio.run(scenario()) == [0] * 9


def test_an_answer_that_begins_while_the_service_drains_ends_its_connection(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running(tiny_artifact, tmp_path) as app:
            before = await ask(app, pieces(picture(9104), 2, 0.0))
            assert (before.status, b"connection" in before.headers) == (200, False)
            given = pieces(picture(9104), 2, 0.1)
            task = asyncio.create_task(ask(app, given))
            await asyncio.sleep(0.05)
            app.state.service.drain()  # the request is here already
            assert (await task).headers[b"connection"] == b"close"

    asyncio.run(scenario())


def test_an_answer_whose_headers_cannot_be_made_is_a_fault(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"asks": make_key("asks", "acme", "infer", points_per_minute=60_000)})

    async def headers(self: Meter) -> dict[str, str]:
        raise ValueError("a reply that nobody thought of")

    monkeypatch.setattr(Meter, "headers", headers)

    async def scenario() -> None:
        async with running(tiny_artifact, tmp_path, keys_file=tmp_path / "keys.toml") as app:
            counted = ("ironclip_requests_total", {"op": "embed", "code": "500"})
            before = REGISTRY.get_sample_value(*counted) or 0
            answer = await ask(app, pieces(picture(9105), 1, None), [*HEADERS, (b"x-api-key", keys["asks"].encode())])
            assert (answer.status, answer.headers[b"content-type"]) == (500, b"application/problem+json")
            assert re.fullmatch(rb"[0-9a-f]{32}", answer.headers[b"x-request-id"])
            assert answer.headers[b"x-ironclip-encoder"].startswith(b"tiny@")
            assert REGISTRY.get_sample_value(*counted) == before + 1

    asyncio.run(scenario())


def test_ids_are_not_given_twice() -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: new_request_id(), range(4000)))
    assert len(set(ids)) == 4000
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_gives_ids_of_its_own() -> None:
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    mine, theirs = (line.split() for line in run.stdout.splitlines())
    assert len(set(mine) | set(theirs)) == len(mine) + len(theirs) == 40


def test_lines_have_the_time_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = telemetry._Clock()
    before = datetime.now(timezone.utc)
    stamps = [str(clock(None, "info", {})["timestamp"]) for _ in range(3)]
    assert stamps == sorted(stamps)
    for stamp in stamps:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
        read = datetime.fromisoformat(stamp.replace("Z", "+00:00"))
        assert timedelta(microseconds=-2) < read - before < timedelta(seconds=5)
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_123_456)
    assert clock(None, "info", {})["timestamp"] == "2023-11-14T22:13:20.000123Z"
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_001_999_999_999)
    assert clock(None, "info", {})["timestamp"] == "2023-11-14T22:13:21.999999Z"


@pytest.mark.parametrize("first", [True, False], ids=["events", "no-event-yet"])
def test_head_does_not_wait_for_the_end_of_a_stream(first: bool) -> None:
    async def scenario() -> None:
        sent: list[Any] = []
        over, ended = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                over.set()

        async def events() -> AsyncIterator[str]:
            try:
                while True:
                    if first:
                        yield "id: 1\n\n"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        scope = {"type": "http", "method": "HEAD", "path": "/probes/x/events", "headers": []}
        exchange = Exchange(scope, receive, send, lambda: False, None)
        exchange.body = Body(Bodies(ROOM, ROOM), "")
        answer = StreamingResponse(events(), media_type="text/event-stream")
        await asyncio.wait_for(answer(exchange.scope, exchange.receive, exchange.send), 5)
        await asyncio.wait_for(ended.wait(), 5)
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        assert (sent[1]["body"], sent[1]["more_body"]) == (b"", False)
        assert await exchange.receive() == {"type": "http.disconnect"}

    asyncio.run(scenario())

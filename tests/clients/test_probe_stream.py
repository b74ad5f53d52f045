"""Probes as they go on: what a broken line costs, what is cancelled and when, and how a probe ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ironclip_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    ProbeCancelled,
    ProbeEvent,
    ProbeStanding,
    UnexpectedAnswer,
)
from ironclip_client.following import EventParser, Following
from ironclip_client.sending import Config

from tests.clients.conftest import QUICK
from tests.clients.gateway import Fault, Gateway

LABELS = ["carrot", "rocket", "cat face"]
EVENTS = "/events"
# Goes on until it is cancelled or its time is up: no cosine is ever so low.
LONG: dict[str, Any] = {
    "objective": "embedding",
    "cosine_below": -1,
    "eps": [1],
    "attack": {"name": "pgd", "iterations": 100_000},
    "seconds": 30.0,
    "gradients": 200_000,
}


def until(state: Callable[[], ProbeStanding], status: str) -> None:
    """Return when the probe has this status."""
    end = time.monotonic() + 20
    while (found := state()).status != status:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_a_probe_is_one_request(client: Client, gateway: Gateway, samples: Path) -> None:
    found = client.probe(
        samples / "carrot.png", LABELS, seconds=5, eps=[0.5, 64], artefacts=["adversarial", "perturbation"]
    )
    assert len(gateway.seen) == 1
    assert [one.eps for one in found.points] == [0.5, 64]
    assert found.broken_at is not None
    assert found.picture("perturbation")[:8] == found.picture()[:8] == b"\x89PNG\r\n\x1a\n"
    assert client.classify(found.picture(), LABELS).label != found.label, "what broke it breaks what is served"
    assert "gradients_at_most" in client.probe_cost(samples / "carrot.png", LABELS)
    with pytest.raises(InvalidRequest):
        client.probe(samples / "carrot.png", LABELS, attack="no-such-attack")


@pytest.mark.parametrize("clean", [True, False], ids=["ended", "broken"])
def test_a_broken_line_loses_nothing_and_repeats_nothing(
    client: Client, gateway: Gateway, samples: Path, clean: bool
) -> None:
    gateway.faults += [
        Fault(path=EVENTS, cut=1, clean=clean),
        Fault(502, path=EVENTS, body=b"bad gateway"),
        Fault(path=EVENTS, hang_up="before"),
        Fault(path=EVENTS, cut=2, clean=clean),
    ]
    with client.probe_stream(samples / "carrot.png", LABELS, eps=[0.5, 64], seconds=20) as stream:
        events = list(stream)
        answer = stream.result()
    numbers = [event.id for event in events]
    assert numbers == sorted(set(numbers))
    assert [events[0].kind, events[-1].kind] == ["started", "done"]
    assert events[-1].result == answer
    assert {event.point.eps for event in events if event.point} == {0.5, 64}
    asked = gateway.asked("GET", EVENTS)
    assert len(asked) >= 4
    assert "last-event-id" not in asked[0].headers
    assert int(asked[-1].headers["last-event-id"]) >= 1
    assert not gateway.asked("DELETE"), "one that has ended is not cancelled"


def test_a_line_that_never_holds_is_given_up(client: Client, gateway: Gateway, samples: Path) -> None:
    gateway.faults += [Fault(path=EVENTS, hang_up="before")] * 20
    with (
        client.probe_stream(samples / "carrot.png", LABELS, **LONG) as stream,
        pytest.raises(ConnectionFailed, match="tries"),
    ):
        list(stream)
    assert len(gateway.asked("GET", EVENTS)) == 1 + QUICK.max_retries
    gateway.faults.clear()
    until(lambda: client.probe_get(stream.id), "cancelled")


def test_whoever_leaves_cancels_the_probe(client: Client, gateway: Gateway, samples: Path) -> None:
    with client.probe_stream(samples / "carrot.png", LABELS, **LONG) as stream:
        for event in stream:
            assert event.kind == "started"
            break
        assert client.probe_get(stream.id).status in ("queued", "running")
    until(lambda: client.probe_get(stream.id), "cancelled")
    with pytest.raises(ProbeCancelled):
        client.probe_follow(stream.id).result()
    loose = client.probe_stream(samples / "carrot.png", LABELS, **LONG)
    events = iter(loose)
    next(events)
    events.close()  # type: ignore[attr-defined]
    until(lambda: client.probe_get(loose.id), "cancelled")


def test_time_that_is_up_cancels_the_probe(client: Client, gateway: Gateway, samples: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        client.probe(samples / "carrot.png", LABELS, **LONG, timeout=1.5)
    (cancelled,) = gateway.asked("DELETE", "/probes/")
    until(lambda: client.probe_get(cancelled.path.rpartition("/")[2]), "cancelled")


def test_probes_are_listed_and_the_next_page_is_asked_for(client: Client, gateway: Gateway, samples: Path) -> None:
    options: dict[str, Any] = {"eps": [1], "attack": "fgsm"}
    started = [client.probe_start(samples / "carrot.png", LABELS, **options).id for _ in range(3)]
    until(lambda: client.probe_get(started[-1]), "done")
    page = client.probes(limit=2)
    assert [one.id for one in page.probes] == started[:0:-1]
    assert (page.probes[0].ended, page.probes[0].label is not None, page.partial) == (True, True, False)
    assert page.probes[0].encoder is not None
    assert page.cursor is not None
    behind = client.probes(limit=1, cursor=page.cursor)
    assert behind.probes[0].id == started[0]
    while behind.cursor is not None:
        behind = client.probes(cursor=behind.cursor)
    assert behind.next is None

    async def ask() -> Any:
        async with AsyncClient(gateway.url) as other:
            return await other.probes(limit=2)

    assert asyncio.run(ask()) == page
    with pytest.raises(InvalidRequest):
        client.probes(limit=0)


def test_probes_by_their_id(client: Client, samples: Path) -> None:
    started = client.probe(samples / "carrot.png", LABELS, wait=False, **LONG)
    client.probe_cancel(started.id)
    until(lambda: client.probe_get(started.id), "cancelled")
    assert client.probe_get(started.id).ended
    quick = client.probe_start(samples / "carrot.png", LABELS, eps=[0.5], seconds=20)
    answer = client.probe_follow(quick.id).result()
    assert client.probe_get(quick.id).result == answer
    for unknown in (client.probe_get, client.probe_cancel, lambda id: client.probe_follow(id).result()):
        with pytest.raises(NotFound):
            unknown("0" * 32)


def test_nothing_behind_the_last_event_is_the_end(client: Client, gateway: Gateway, samples: Path) -> None:
    gateway.faults += [Fault(204, path=EVENTS, body=b"")]
    stream = client.probe_follow(client.probe_start(samples / "carrot.png", LABELS, eps=[0.5], seconds=20).id)
    assert list(stream) == []
    assert len(gateway.asked("GET", EVENTS)) == 1
    with pytest.raises(UnexpectedAnswer, match="probe_get"):
        stream.result()


def test_the_asynchronous_stream_does_the_same(gateway: Gateway, client: Client, samples: Path) -> None:
    gateway.faults += [Fault(path=EVENTS, cut=1), Fault(path=EVENTS, hang_up="before")]

    async def ask() -> tuple[list[ProbeEvent], str, str]:
        async with AsyncClient(gateway.url, retries=QUICK) as other:
            async with other.probe_stream(samples / "carrot.png", LABELS, eps=[0.5, 64], seconds=20) as stream:
                events = [event async for event in stream]
                assert (await stream.result()).label == events[0].data["label"]
            async with other.probe_stream(samples / "carrot.png", LABELS, **LONG) as left:
                async for _ in left:
                    break

            async def wait() -> None:
                await other.probe(samples / "carrot.png", LABELS, **LONG)

            # Who is cancelled cancels.
            task = asyncio.create_task(wait())
            while len(gateway.asked("POST")) < 3 or not gateway.asked("GET", gateway.seen[-1].path):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return events, left.id, gateway.asked("DELETE")[-1].path.rpartition("/")[2]

    events, *cancelled = asyncio.run(ask())
    assert [events[0].kind, events[-1].kind] == ["started", "done"]
    numbers = [event.id for event in events]
    assert numbers == sorted(set(numbers))
    for identity in cancelled:
        until(lambda identity=identity: client.probe_get(identity), "cancelled")  # type: ignore[misc]
    assert len(set(cancelled)) == 2


STREAM = (
    b': hello\n\nid: 3\nevent: point\ndata: {"eps":\ndata: 1}\n\n'
    b'data:{"a": "\xc3\xa9"}\r\n\r\nid: 4\rdata: {}\r\rdata: {"cut'
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    parser = EventParser()
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert events == [
        ProbeEvent("point", {"eps": 1}, 3),
        ProbeEvent("message", {"a": "é"}, None),
        ProbeEvent("message", {}, 4),
    ]


def test_a_stream_of_something_else_is_told() -> None:
    with pytest.raises(UnexpectedAnswer):
        list(EventParser().feed(b"data: <html>\n\n"))


def test_whoever_takes_long_over_the_last_event_has_its_result() -> None:
    following = Following(Config.read("http://h", "", 30, 0, None), 0.05, "a")
    events = b"id: 1\nevent: cancelled\ndata: {}\n\n"
    for event in following.feed(events):
        assert event.ends
        time.sleep(0.1)
    assert following.ended


def test_a_probe_that_fails_says_why_each_time_it_is_asked() -> None:
    error = {"code": "not-ready", "title": "t", "status": 503, "detail": "The worker is down."}
    following = Following(Config.read("http://h", "", 30, 0, None), 30, "a")
    data = json.dumps({"error": error}).encode()
    for ask in (lambda: list(following.feed(b"id: 1\nevent: failed\ndata: " + data + b"\n\n")), following.answer):
        with pytest.raises(NotReady, match="worker is down"):
            ask()
    assert following.ended

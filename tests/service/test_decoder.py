"""Decoding: off the event loop, bounded, and in the order of urgency."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import torch
from PIL import Image
from prometheus_client import REGISTRY

from ironclip.errors import DeadlineExceeded, ImageInvalid, NotReady, Overloaded
from ironclip.preprocessing import Preprocessing
from service import telemetry
from service.containers import read_container
from service.decode_pace import Claim, DecodePace, decode_threads, read_claim
from service.decoder import ImageDecoder
from service.images import ImageLimits, decode
from service.urgency import BATCH, CURRENT, INTERACTIVE, Urgency
from tests.service.conftest import ServiceProcess, metric, picture, until

LIMITS = ImageLimits()
SMALL = Preprocessing(32)


def jpeg(corpus: ModuleType, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    corpus.picture(width, height).save(buffer, "JPEG")
    return buffer.getvalue()


def asked(decoder: ImageDecoder, data: bytes, name: str, urgency: Urgency, ended: list[str]) -> asyncio.Task[None]:
    """A request of that urgency for one picture, handed in; its name is kept when it has been answered.

    Deadlines are seconds from now.
    """
    deadline = time.monotonic() + urgency.deadline

    async def ask() -> None:
        CURRENT.set(Urgency(urgency.rank, deadline))
        decoder.admit([data])
        await decoder.decode(data, SMALL)
        ended.append(name)

    return asyncio.create_task(ask())


def test_whoever_is_most_urgent_is_decoded_first(corpus: ModuleType) -> None:
    first, small = jpeg(corpus, 2400, 1800), jpeg(corpus, 64, 64)

    async def scenario() -> list[str]:
        decoder, ended = ImageDecoder(LIMITS, workers=1), list[str]()
        tasks = [asked(decoder, first, "first", Urgency(BATCH, 91.0), ended)]
        await asyncio.sleep(0)
        tasks += [asked(decoder, small, f"batch {at}", Urgency(BATCH, at), ended) for at in (91.0, 92.0)]
        tasks += [asked(decoder, small, f"request {at}", Urgency(INTERACTIVE, at), ended) for at in (99.0, 98.0)]
        await asyncio.gather(*tasks)
        decoder.close()
        return ended

    assert asyncio.run(scenario()) == ["first", "request 98.0", "request 99.0", "batch 91.0", "batch 92.0"]


def test_batch_work_is_not_starved(corpus: ModuleType) -> None:
    first, small = jpeg(corpus, 2400, 1800), jpeg(corpus, 64, 64)

    async def scenario() -> list[str]:
        decoder, ended = ImageDecoder(LIMITS, workers=1), list[str]()
        tasks = [asked(decoder, first, "first", Urgency(), ended)]
        await asyncio.sleep(0)
        tasks += [asked(decoder, small, "batch", Urgency(BATCH), ended) for _ in range(2)]
        tasks += [asked(decoder, small, "request", Urgency(), ended) for _ in range(20)]
        await asyncio.gather(*tasks)
        decoder.close()
        return ended

    ended = asyncio.run(scenario())
    assert [at for at, name in enumerate(ended) if name == "batch"] == [8, 16]


def test_what_nobody_waits_for_any_more_is_let_go_of(corpus: ModuleType) -> None:
    """While others keep the thread busy: else bytes that are counted as given back would pile up."""
    first, small = jpeg(corpus, 2400, 1800), jpeg(corpus, 64, 64)

    async def scenario() -> None:
        decoder, ended = ImageDecoder(LIMITS, workers=1, max_pending=300), list[str]()
        running = [asked(decoder, first, "first", Urgency(), ended) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(4):
            bodies = [small + bytes([at]) for at in range(200)]
            gone = [asked(decoder, one, "gone", Urgency(INTERACTIVE, 9e3), ended) for one in bodies]
            await asyncio.sleep(0)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            waiting = decoder._queue._works
            assert decoder.pending <= 3
            assert len(waiting) <= 3
            assert sum(map(len, waiting._heaps)) <= 3 * 3 + 64
        await asyncio.gather(*running)
        decoder.close()
        assert ended == ["first"] * 3

    asyncio.run(scenario())


def test_batch_work_does_not_shut_requests_out(corpus: ModuleType) -> None:
    first, small = jpeg(corpus, 2400, 1800), jpeg(corpus, 64, 64)

    async def scenario() -> None:
        decoder, ended = ImageDecoder(LIMITS, workers=1, max_pending=2), list[str]()
        tasks = [asked(decoder, data, "batch", Urgency(BATCH), ended) for data in (first, small)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await asked(decoder, small, "batch", Urgency(BATCH), ended)
        await asyncio.gather(*tasks, asked(decoder, small, "request", Urgency(), ended))
        assert ended == ["batch", "request", "batch"]
        decoder.close()

    asyncio.run(scenario())


def test_decoder_leaves_the_loop_free_and_bounds_what_waits(corpus: ModuleType) -> None:
    buffer = io.BytesIO()
    corpus.picture(2400, 1800).save(buffer, "JPEG")

    async def scenario() -> None:
        decoder = ImageDecoder(LIMITS, workers=1, max_pending=3)
        tasks = [asyncio.create_task(decoder.decode(buffer.getvalue(), SMALL)) for _ in range(3)]
        await asyncio.sleep(0)
        assert decoder.pending == 3
        with pytest.raises(Overloaded) as caught:
            decoder.admit([buffer.getvalue()])
        assert caught.value.retry_after
        assert caught.value.limit == 3
        tasks[2].cancel()  # still waiting: leaves the queue
        ticks = 0
        while not tasks[1].done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert ticks > 3
        assert torch.equal((await tasks[0]).pixels, (await tasks[1]).pixels)
        assert decoder.pending == 0
        with pytest.raises(ImageInvalid):
            await decoder.decode(b"\xff\xd8\xff", SMALL)
        assert decoder.pending == 0
        decoder.close()
        with pytest.raises(NotReady):
            await decoder.decode(buffer.getvalue(), SMALL)

    asyncio.run(scenario())


def test_a_huge_picture_is_not_waited_for(corpus: ModuleType) -> None:
    buffer = io.BytesIO()
    corpus.picture(4000, 3000).save(buffer, "PNG", compress_level=1)

    async def scenario() -> list[bool]:
        decoder = ImageDecoder(LIMITS, workers=1)
        assert not decoder.flowing
        task = asyncio.create_task(decoder.decode(buffer.getvalue(), SMALL))
        await asyncio.sleep(0)
        seen = [decoder.flowing]
        while not task.done():
            await asyncio.sleep(0.002)
            seen.append(decoder.flowing)
        decoder.close()
        return seen

    # On a busy machine the first look may come later than a usual picture does.
    tries = (asyncio.run(scenario()) for _ in range(20))
    assert any(seen[0] and False in seen[:-1] for seen in tries)


def test_a_decoder_that_is_stuck_says_for_how_long(corpus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a thread is free, and whatever comes and is given up meanwhile."""
    released, small = threading.Event(), jpeg(corpus, 64, 64)

    def stuck(*_: object) -> None:
        released.wait(60)
        raise ImageInvalid("at last")

    async def scenario() -> None:
        decoder = ImageDecoder(ImageLimits(max_pixels=5000), workers=2)
        with monkeypatch.context() as codec:
            codec.setattr("service.decoder.decode", stuck)
            first = asyncio.create_task(decoder.decode(small, SMALL))
            await asyncio.sleep(0.1)
            assert decoder.stalled_seconds == 0
            assert decoder.oldest_seconds >= 0.05  # one stuck thread of two shows too
            telemetry.watch_decoder(decoder)
            assert (REGISTRY.get_sample_value("ironclip_decode_oldest_seconds") or 0) >= 0.05
            second = asyncio.create_task(decoder.decode(small, SMALL))
            await asyncio.sleep(0.1)
            for _ in range(5):
                waiting = asyncio.create_task(decoder.decode(small, SMALL))
                await asyncio.sleep(0.05)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            assert decoder.stalled_seconds >= 0.25
            assert decoder.hangs(0.25)
            assert not decoder.hangs(60)
            released.set()
            await asyncio.gather(first, second, return_exceptions=True)
            assert decoder.oldest_seconds == 0
        await decoder.decode(small, SMALL)
        assert decoder.stalled_seconds == 0
        assert not decoder.hangs(0)
        assert decoder.oldest_seconds == 0
        decoder.close()

    asyncio.run(scenario())


def test_the_largest_pictures_are_given_their_time(corpus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon a model worker counts as hanging."""
    released, small = threading.Event(), jpeg(corpus, 64, 64)
    monkeypatch.setattr("service.decoder.decode", lambda *_: released.wait(60))

    async def scenario() -> None:
        decoder = ImageDecoder(LIMITS, workers=1)
        task = asyncio.create_task(decoder.decode(small, SMALL))
        await asyncio.sleep(0.1)
        assert decoder.stalled_seconds > 0
        assert not decoder.hangs(0.001)
        released.set()
        await task
        decoder.close()

    asyncio.run(scenario())


def big_png(side: int, colour: int = 0) -> bytes:
    """A picture of one colour: few bytes, many pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 0, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def refusal(decoder: ImageDecoder, urgency: Urgency, pictures: list[bytes]) -> Overloaded | None:
    """What a request with these pictures is told at the door, if it is sent away."""
    token = CURRENT.set(urgency)
    try:
        decoder.admit(pictures)
    except Overloaded as error:
        return error
    finally:
        CURRENT.reset(token)
    return None


def test_a_request_is_let_in_by_the_time_of_what_is_ahead_of_it(corpus: ModuleType) -> None:
    """Four pictures of 4 million pixels are a second of one thread, whatever few bytes they have."""
    huge, small = big_png(2000), jpeg(corpus, 64, 64)

    async def scenario() -> None:
        decoder, ended = ImageDecoder(LIMITS, workers=1, max_wait=0.2), list[str]()
        patient = Urgency(INTERACTIVE, time.monotonic() + 60)
        # What a request brings itself does not count, and where nothing is ahead its deadline does not either.
        assert refusal(decoder, patient, [huge] * 20) is None
        assert refusal(decoder, Urgency(INTERACTIVE, time.monotonic() + 0.01), [huge]) is None
        tasks = [asyncio.create_task(decoder.decode(huge, SMALL)) for _ in range(4)]
        await asyncio.sleep(0)
        telemetry.watch_decoder(decoder)
        waits = REGISTRY.get_sample_value("ironclip_queue_seconds_estimate", {"encoder": "", "tower": "decode"})
        assert 0.4 < (waits or 0) < 2
        told = []
        for pictures in ([small], [small] * 30):
            found = refusal(decoder, patient, pictures)
            assert found is not None
            assert (found.limit_name, found.limit) == ("decode-ms", 200)
            assert "IRONCLIP_MAX_QUEUE_MS" in found.detail
            told.append(found.retry_after or 0)
        assert 0.1 < told[0] < told[1]  # not all of them at once
        # Whoever has less time overtakes: what has more is not ahead of it, but what a thread has in hand is.
        tasks.append(asked(decoder, small, "in haste", Urgency(INTERACTIVE, 30.0), ended))
        decoder.max_wait = 60
        found = refusal(decoder, Urgency(INTERACTIVE, time.monotonic() + 0.01), [small])
        assert found is not None
        assert found.limit_name == "deadline"
        assert "X-Request-Timeout-Ms" in found.detail
        await asyncio.gather(*tasks)
        assert refusal(decoder, patient, [small]) is None
        assert decoder.estimated_wait_seconds == 0
        decoder.close()

    asyncio.run(scenario())


def test_what_cannot_be_in_time_makes_way_for_what_can(corpus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    huge, small, gate = big_png(2000), jpeg(corpus, 64, 64), threading.Event()

    def slow(*arguments: object) -> object:
        gate.wait(60)
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("service.decoder.decode", slow)

    async def scenario() -> None:
        decoder = ImageDecoder(LIMITS, workers=1)

        def handed_in(data: bytes, seconds: float) -> asyncio.Task[object]:
            async def ask() -> object:
                CURRENT.set(Urgency(INTERACTIVE, time.monotonic() + seconds))
                return await decoder.decode(data, SMALL)

            return asyncio.create_task(ask())

        first = asyncio.create_task(decoder.decode(small, SMALL))
        await asyncio.sleep(0.05)
        late, fine = handed_in(huge, 0.15), handed_in(small, 60.0)
        await asyncio.sleep(0.05)
        gate.set()
        await first
        with pytest.raises(DeadlineExceeded, match="was given up, not begun"):
            await late
        await fine
        # Where nothing else waits it is tried: the estimate may be wrong.
        await handed_in(huge, 0.1)
        decoder.close()

    asyncio.run(scenario())


def test_claims_are_those_that_the_reader_finds(corpus: ModuleType) -> None:
    pictures = [corpus.encoded(form, corpus.picture(120, 70)) for form in ("JPEG", "PNG", "WEBP")]
    pictures += [corpus.encoded("WEBP", corpus.picture(120, 70), lossless=True)]
    pictures += [corpus.encoded("WEBP", corpus.picture(120, 70, "RGBA"), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")]
    pictures += [corpus.encoded("JPEG", corpus.picture(120, 70), progressive=True)]
    pictures += [corpus.into_jpeg(*[corpus.segment(0xFE, b"x" * 600)] * 200, jpeg=pictures[0])]
    pictures += [data for name, data in corpus.odd().items() if name != "jpeg-1000-exif-blocks"]
    for data in pictures:
        found = read_container(data, LIMITS)
        assert read_claim(data, LIMITS.max_pixels) == Claim(found.format, found.width * found.height)
    # Who hides the size far behind is taken for as large as is accepted; what ends before it is refused at once.
    assert read_claim(corpus.odd()["jpeg-1000-exif-blocks"], 5000) == Claim("JPEG", 5000)
    assert read_claim(big_png(900)[:18], 5000) == Claim("PNG", 0)
    assert read_claim(b"GIF89a", 5000) == Claim("", 0)
    for data in corpus.refused().values():
        assert 0 <= read_claim(data, 5000).pixels <= 5000


def test_the_pace_is_learnt_by_format() -> None:
    pace, claim, other = DecodePace(), Claim("PNG", 1_000_000), Claim("JPEG", 1_000_000)
    before = pace.seconds(other)
    for _ in range(60):
        pace.observe(claim, 0.5)
    assert pace.seconds(claim) == pytest.approx(0.5, rel=0.05)
    assert pace.seconds(other) == before
    assert pace.seconds(Claim("", 0)) == 0


def test_threads_are_no_more_than_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 4 GiB on a host of 64 cores: 64 pictures of 25 million pixels at once would take 22 GB."""
    monkeypatch.setattr("service.decode_pace.usable_cpus", lambda: 64)
    monkeypatch.setattr("service.decode_pace.usable_memory", lambda: 4 << 30)
    assert decode_threads(LIMITS.max_pixels) == 3
    assert decode_threads(1_000_000) == 64
    assert decode_threads(1_000_000, processes=8) == 8
    assert decode_threads(LIMITS.max_pixels, processes=8) == 1
    monkeypatch.setattr("service.decode_pace.usable_memory", lambda: 256 << 20)
    assert decode_threads(LIMITS.max_pixels) == 1


def test_large_pictures_are_refused_in_time_where_the_model_has_nothing_to_do(
    start_service: Callable[..., ServiceProcess], tiny_artifact: Path
) -> None:
    """Sixteen million pixels each, for an encoder of 64: to wait for the deadline would help nobody."""
    service = start_service(encoders=f"tiny={tiny_artifact}", decode_workers=1, max_queue_ms=400)
    pictures = [big_png(4000, colour) for colour in range(10)]

    def ask(data: bytes) -> httpx.Response:
        return httpx.post(f"{service.url}/embed", content=data, headers={"Content-Type": "image/png"}, timeout=60)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, pictures))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = [answer.json() for answer in answers if answer.status_code == 429]
    assert {problem["limit_name"] for problem in refused} == {"decode-ms"}
    assert all(problem["limit"] == 400 for problem in refused)
    assert metric(service.url, 'ironclip_refused_total{limit="decode-ms"}') == len(refused)
    until(lambda: metric(service.url, 'ironclip_queue_seconds_estimate{encoder="",tower="decode"}') == 0)
    assert ask(picture(1)).status_code == 200

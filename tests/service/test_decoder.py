"""Decoding: off the event loop, bounded, and in the order of urgency."""

from __future__ import annotations

import asyncio
import io
import threading
from types import ModuleType

import pytest
import torch
from prometheus_client import REGISTRY

from ironclip.errors import ImageInvalid, NotReady, Overloaded
from ironclip.preprocessing import Preprocessing
from service import telemetry
from service.decoder import ImageDecoder
from service.images import ImageLimits
from service.urgency import BATCH, CURRENT, INTERACTIVE, Urgency

LIMITS = ImageLimits()
SMALL = Preprocessing(32)


def jpeg(corpus: ModuleType, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    corpus.picture(width, height).save(buffer, "JPEG")
    return buffer.getvalue()


def asked(decoder: ImageDecoder, data: bytes, name: str, urgency: Urgency, ended: list[str]) -> asyncio.Task[None]:
    """A request of that urgency for one picture, handed in; its name is kept when it has been answered."""

    async def ask() -> None:
        CURRENT.set(urgency)
        await decoder.decode(data, SMALL)
        ended.append(name)

    return asyncio.create_task(ask())


def test_whoever_is_most_urgent_is_decoded_first(corpus: ModuleType) -> None:
    first, small = jpeg(corpus, 2400, 1800), jpeg(corpus, 64, 64)

    async def scenario() -> list[str]:
        decoder, ended = ImageDecoder(LIMITS, workers=1), list[str]()
        tasks = [asked(decoder, first, "first", Urgency(BATCH, 1.0), ended)]
        await asyncio.sleep(0)
        tasks += [asked(decoder, small, f"batch {at}", Urgency(BATCH, at), ended) for at in (1.0, 2.0)]
        tasks += [asked(decoder, small, f"request {at}", Urgency(INTERACTIVE, at), ended) for at in (9.0, 8.0)]
        await asyncio.gather(*tasks)
        decoder.close()
        return ended

    assert asyncio.run(scenario()) == ["first", "request 8.0", "request 9.0", "batch 1.0", "batch 2.0"]


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
            gone = [asked(decoder, one, "gone", Urgency(INTERACTIVE, 9e9), ended) for one in bodies]
            await asyncio.sleep(0)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            waiting = decoder._waiting._works
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
            await decoder.decode(buffer.getvalue(), SMALL)
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

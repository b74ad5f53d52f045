"""Label sets being encoded: nobody waits for more than their share, nothing is worked on that nobody wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import LabelError, NotReady, Overloaded
from ironclip.labels import LabelSet
from ironclip.textbank import build_text_bank
from service import telemetry
from service.cache import ArrayCache
from service.decisions import Classifiers, Plan
from service.runtime import ServedEncoder
from service.urgency import BATCH, CURRENT, INTERACTIVE, Urgency
from tests.service.conftest import ServiceProcess, as_base64, metric, picture

PER_TEXT = 0.0005


def serve(
    encoder: Encoder,
    scenario: Callable[[ServedEncoder], Awaitable[None]],
    *,
    slow: bool = True,
    pause: float = 0.0,
    **options: Any,
) -> None:
    """Run a scenario on an encoder whose text tower takes PER_TEXT for each text at least, and a pause for a batch."""

    async def run() -> None:
        served = ServedEncoder("tiny", encoder, dtype="float32", **options)
        plain = served.texts._attempts._run

        def run_texts(tokens: Sequence[Tensor]) -> Sequence[Tensor]:
            time.sleep(pause + PER_TEXT * len(tokens))
            return plain(tokens)

        if slow:
            served.texts._attempts._run = run_texts
        served.start()
        try:
            await scenario(served)
        finally:
            await served.stop()

    asyncio.run(run())


def labels(count: int, of: str = "label") -> LabelSet:
    return LabelSet.parse([f"{of} {i}" for i in range(count)], ["a photo of a {}."])


def plan(served: ServedEncoder, label_set: LabelSet) -> Plan:
    return Plan(served, label_set, None, "rollup", make_defence(), {"digest": label_set.digest})


def classifiers() -> Classifiers:
    return Classifiers(ArrayCache("test", max_bytes=1 << 20, ttl=60, link=None, prefix="t", secret=b""), 1 << 20)


def test_a_served_bank_is_the_librarys(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        label_set = LabelSet.parse(
            ["dog", {"name": "a very long-winded cat", "prompts": ["cat", "dog"], "descriptions": ["it purrs"]}, "犬"]
        )
        got = await served.text_bank(label_set, descriptions=True)
        expected = build_text_bank(tiny_encoder, label_set, descriptions=True)
        assert (got.encoder, got.label_set, got.descriptions) == (expected.encoder, expected.label_set, True)
        for name in ("weights", "norms", "texts", "rows", "counts", "blank"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name))
        assert not got.texts.is_inference()

    serve(tiny_encoder, scenario, slow=False, max_batch=2)


def test_small_requests_pass_by_a_large_label_set(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        telemetry.watch_encoder("tiny", lambda: [served])
        large = asyncio.create_task(served.text_bank(labels(20_000)))  # 10 s at least
        await asyncio.sleep(0.3)
        start = time.perf_counter()
        await served.text_bank(labels(2, "other"))
        await served.encode_texts(["a text of another caller"])
        assert time.perf_counter() - start < 4  # a few parts of 16 ms, on a machine that may be busy
        assert not large.done()
        waiting = next(iter(telemetry.QUEUE_ITEMS.labels("tiny", "bank").collect())).samples[0].value
        assert 100 < waiting <= 20_000
        large.cancel()

    serve(tiny_encoder, scenario)


@pytest.mark.parametrize("first", ["interactive", "batch"])
def test_a_stream_of_texts_does_not_keep_a_label_set_waiting(tiny_encoder: Encoder, first: str) -> None:
    """Texts have deadlines and label sets none; nor does a set asked for as batch work hold up one that is urgent."""

    async def scenario(served: ServedEncoder) -> None:
        asked = 0

        async def stream() -> None:
            nonlocal asked
            while True:
                CURRENT.set(Urgency(INTERACTIVE, time.monotonic() + 30))
                asked += 1
                await served.encode_texts([f"text {asked} {i}" for i in range(8)])

        streams = [asyncio.create_task(stream()) for _ in range(4)]
        await asyncio.sleep(0.5)
        if first == "batch":
            CURRENT.set(Urgency(BATCH))
            slow = asyncio.create_task(served.text_bank(labels(12, "unhurried")))
            await asyncio.sleep(0.1)
        CURRENT.set(Urgency(INTERACTIVE))
        await asyncio.wait_for(served.text_bank(labels(3)), 5)
        for task in (*streams, *([slow] if first == "batch" else [])):
            task.cancel()
        assert asked > 8

    serve(tiny_encoder, scenario, max_batch=8, max_wait=1.0, pause=0.05)


def test_too_many_prompts_are_refused_with_the_time_they_take(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        first = asyncio.create_task(served.text_bank(labels(3000)))  # alone, a set of any size is taken
        await asyncio.sleep(0.3)
        with pytest.raises(Overloaded) as caught:
            await served.text_bank(labels(3000, "other"))
        assert 3000 * PER_TEXT * 0.5 < float(caught.value.retry_after or 0) < 60
        assert len((await served.text_bank(labels(200, "few"))).weights) == 200
        first.cancel()

    serve(tiny_encoder, scenario, max_queue=32)


def test_a_full_text_queue_does_not_fail_a_bank(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        bank = asyncio.create_task(served.text_bank(labels(300)))
        for i in range(20):
            outcomes = await asyncio.gather(
                *(served.encode_texts([f"text {i} {j}"] * 8) for j in range(4)), return_exceptions=True
            )
            assert any(isinstance(outcome, list) for outcome in outcomes)
        assert len((await bank).weights) == 300

    serve(tiny_encoder, scenario, max_queue=16, max_batch=8)


def test_a_set_that_nobody_waits_for_is_given_up(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        kept, wanted = classifiers(), plan(served, labels(4000))
        callers = [asyncio.create_task(kept.get(wanted)) for _ in range(2)]
        await asyncio.sleep(0.3)
        callers[0].cancel()
        await asyncio.sleep(0.2)
        left = served.banks.queued
        assert 0 < left < 4000  # the other one still waits
        callers[1].cancel()
        await asyncio.sleep(0.2)
        assert served.banks.queued == 0
        assert served.texts.queued == 0
        assert not served.texts.busy
        # Who asks at the moment when the last one leaves is not given their cancellation.
        small = plan(served, labels(40))
        leaving = asyncio.create_task(kept.get(small))
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert len((await kept.get(small)).names) == 40

    serve(tiny_encoder, scenario)


def test_a_caller_with_a_short_deadline_gets_there_by_asking_again(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        wanted, asked = labels(4000), 0
        bank = None
        while bank is None and asked < 60:
            asked += 1
            try:
                bank = await asyncio.wait_for(served.text_bank(wanted), 1)  # the whole takes 2 s at least
            except asyncio.TimeoutError:
                continue
        assert asked > 1
        assert bank is not None
        torch.testing.assert_close(bank.weights, build_text_bank(tiny_encoder, wanted).weights)

    serve(tiny_encoder, scenario)


def test_a_stop_does_not_wait_for_banks(tiny_encoder: Encoder) -> None:
    outcomes: list[object] = []

    async def scenario(served: ServedEncoder) -> None:
        bank = asyncio.create_task(served.text_bank(labels(20_000)))
        await asyncio.sleep(0.3)
        start = time.perf_counter()
        await served.stop()
        outcomes.extend(await asyncio.gather(bank, return_exceptions=True))
        assert time.perf_counter() - start < 5  # of 10 s at least

    serve(tiny_encoder, scenario)
    assert isinstance(outcomes[0], NotReady)


def test_tokenizing_takes_turns_ends_with_its_caller_and_is_bounded(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = Encoder.tokenize

    def tokenize(self: Encoder, texts: Sequence[str], *, truncate: bool = False) -> Tensor:
        read.extend(texts)
        time.sleep(0.002)
        return plain(self, texts, truncate=truncate)

    async def scenario(served: ServedEncoder) -> None:
        # Files and plans go through the default executor; with one thread, whoever blocks it shows.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        monkeypatch.setattr(Encoder, "tokenize", tokenize)
        many = asyncio.create_task(served.encode_texts(["word"] * 1000))
        await asyncio.sleep(0.1)
        start = time.perf_counter()
        await asyncio.to_thread(int)
        await served.encode_texts(["a dog"])
        assert time.perf_counter() - start < 1.5  # of 2 s
        more = asyncio.create_task(served.encode_texts(["word"] * 500))  # what it brings itself does not count
        await asyncio.sleep(0)
        for count in (1, 500):
            with pytest.raises(Overloaded) as caught:
                await served.encode_texts(["word"] * count)
            assert caught.value.retry_after
        many.cancel()
        more.cancel()
        await asyncio.sleep(0.2)
        count = len(read)
        assert count < 500
        await asyncio.sleep(0.2)
        assert len(read) == count
        assert served.tokens.queued == 0
        outcomes = await served.encode_texts(["ab" * 400, "a cat"], truncate=True)
        assert isinstance(outcomes[0], LabelError)
        assert isinstance(outcomes[1], Tensor)

    serve(tiny_encoder, scenario, slow=False, max_queue=128)


def test_a_burst_of_large_sets_leaves_the_service_answering(
    tiny_artifact: Path, start_service: Callable[..., ServiceProcess]
) -> None:
    service = start_service(encoders=f"tiny={tiny_artifact}")
    image = as_base64(picture(1))
    statuses = []

    async def burst() -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:

            async def ask(i: int) -> None:
                names, templates = [f"{i} {j}" for j in range(1000)], [f"{{}} in place {k}" for k in range(100)]
                answer = await client.post(
                    "/classify",
                    json={"image": image, "labels": names, "templates": templates},
                    headers={"X-Request-Timeout-Ms": "1500"},
                )
                statuses.append(answer.status_code)
                assert answer.status_code != 429 or int(answer.headers["Retry-After"]) >= 1

            await asyncio.gather(*(ask(i) for i in range(12)))

    asyncio.run(burst())
    assert set(statuses) <= {429, 504}
    assert 429 in statuses
    start = time.monotonic()
    assert httpx.post(f"{service.url}/classify", json={"image": image, "labels": ["a", "b"]}).status_code == 200
    assert time.monotonic() - start < 3
    assert metric(service.url, 'ironclip_queue_items{encoder="tiny",tower="bank"}') == 0
    # One large set is what a stop finds under way.
    names = [f"l {j}" for j in range(20_000)]
    assert httpx.put(f"{service.url}/label-sets/large", json={"labels": names}).status_code in (200, 201)
    time.sleep(0.5)
    assert metric(service.url, 'ironclip_queue_items{encoder="tiny",tower="bank"}') > 0
    start = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - start < 5

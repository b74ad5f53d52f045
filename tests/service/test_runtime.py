"""A served encoder answers what the library would, batches across requests, and chooses its dtype with care."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ironclip.defences import Defence, make_defence
from ironclip.encoder import Encoder
from ironclip.errors import LabelError, NotReady, OptionError
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from ironclip.textbank import build_text_bank
from service import batching
from service import dtype as dtype_module
from service.dtype import choose_dtype
from service.model_loading import Loader
from service.probe_job import Job
from service.probe_places import Places
from service.runtime import ServedEncoder, is_out_of_memory
from service.settings import Settings
from service.versions import Version

NONE = make_defence()


class Mirrored:
    """A defence of two views: the picture and its mirror image."""

    name = "mirrored"
    random = False
    differentiable = True
    optimising = False
    heads = ("cosine",)
    view_count = 2
    cost = 2

    def options(self) -> dict[str, Any]:
        return {}

    def prepare(self, bank: object) -> None: ...

    def make_views(self, pixels: Tensor, encode: Any) -> Tensor:
        return torch.stack([pixels, pixels.flip(-1)], dim=1)

    def logits(self, features: Tensor, bank: object, state: None, head: Any) -> Tensor:
        raise NotImplementedError


def pictures(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator))


def serve(
    encoder: Encoder, scenario: Callable[[ServedEncoder], Awaitable[None]], dtype: str = "float32", **options: Any
) -> None:
    async def run() -> None:
        served = ServedEncoder("tiny", encoder, dtype=dtype, **options)
        served.start()
        assert served.alive
        try:
            await scenario(served)
        finally:
            await served.stop()
        assert not served.alive
        with pytest.raises(NotReady):
            await served.encode_images(pictures(1), NONE)
        with pytest.raises(NotReady):
            await served.text_bank(LabelSet.parse(["a"]))

    asyncio.run(run())


def test_features_are_the_librarys_and_do_not_depend_on_batch_mates(tiny_encoder: Encoder) -> None:
    mirrored: Defence = Mirrored()  # type: ignore[assignment]
    seen: list[tuple[str, int]] = []

    async def scenario(served: ServedEncoder) -> None:
        images = pictures(11)
        with torch.no_grad():
            plain = tiny_encoder.encode_image(to_float(torch.stack(images)))
            flipped = tiny_encoder.encode_image(to_float(torch.stack(images).flip(-1)))
        requests = [served.encode_images([image], NONE if i % 2 else mirrored) for i, image in enumerate(images)]
        for i, (rows,) in enumerate(await asyncio.gather(*requests)):
            assert isinstance(rows, Tensor)
            assert rows.shape == (1 if i % 2 else 2, 32)
            torch.testing.assert_close(rows[0], plain[i], rtol=1e-4, atol=1e-5)
            if i % 2 == 0:
                torch.testing.assert_close(rows[1], flipped[i], rtol=1e-4, atol=1e-5)
            assert rows.untyped_storage().nbytes() == rows.nbytes  # keeping one keeps no batch

    serve(tiny_encoder, scenario, observe=lambda tower, items, *_: seen.append((tower, items)), max_batch=4)
    assert sum(items for tower, items in seen if tower == "image") == 5 + 2 * 6  # views count


def test_a_picture_that_breaks_the_model_fails_alone(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        images = pictures(6)
        images[2] = torch.zeros(3, 31, 31, dtype=torch.uint8)
        outcomes = await served.encode_images(images, NONE)
        assert [isinstance(outcome, Exception) for outcome in outcomes] == [i == 2 for i in range(6)]
        assert served.alive

    serve(tiny_encoder, scenario)


def test_texts_have_their_own_outcomes(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        texts = ["a dog", "word " * 60, "two brown cats on a mat"]
        outcomes = await served.encode_texts(texts)
        assert isinstance(outcomes[1], LabelError)
        with torch.no_grad():
            expected = tiny_encoder.encode_text([texts[0], texts[2]])
        torch.testing.assert_close(torch.stack([outcomes[0], outcomes[2]]), expected, rtol=1e-4, atol=1e-5)  # type: ignore[list-item]
        assert all(isinstance(outcome, Tensor) for outcome in await served.encode_texts(texts, truncate=True))
        assert await served.encode_texts([]) == []

    serve(tiny_encoder, scenario)


def test_text_banks_are_built_off_the_loop_and_can_carry_gradients(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        label_set = LabelSet.parse(["dog", "cat"])
        bank = await served.text_bank(label_set)
        torch.testing.assert_close(bank.weights, build_text_bank(tiny_encoder, label_set).weights)
        pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
        (served.encoder.encode_image(pixels) @ bank.weights.T).sum().backward()  # type: ignore[no-untyped-call]
        assert pixels.grad is not None
        with pytest.raises(LabelError):
            await served.text_bank(LabelSet.parse(["word " * 60]))

    serve(tiny_encoder, scenario)


def test_auto_dtype_is_measured_and_reported(tiny_encoder: Encoder) -> None:
    encoder, report = choose_dtype(tiny_encoder, "auto", seconds=0)
    content = report.to_json()
    assert {trial["dtype"] for trial in content["trials"]} == {"float32", "bfloat16"}
    assert content["chosen"] in ("float32", "bfloat16")
    assert encoder.dtype == getattr(torch, report.chosen)
    tried = [trial for trial in content["trials"] if trial["min_cosine"] is not None]
    assert report.chosen in {trial["dtype"] for trial in tried}
    # One that has no other to be compared with needs no timing.
    assert all(trial["images_per_second"].get("8", 0) > 0 for trial in tried) == (len(tried) > 1)
    assert encoder.digest == tiny_encoder.digest


def test_a_dtype_without_arithmetic_is_served_where_asked_for(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ironclip.encoder.pays", lambda dtype: dtype == torch.bfloat16)
    _, found = choose_dtype(tiny_encoder, "auto")
    assert found.chosen == "float32"
    assert (found.trials[1].dtype, found.trials[1].min_cosine) == ("bfloat16", None)
    assert "no arithmetic" in str(found.trials[1].rejected)
    assert found.to_json()["trials"][1]["images_per_second"] == {}
    pinned, found = choose_dtype(tiny_encoder, "bfloat16")
    assert (found.chosen, pinned.dtype, pinned.arithmetic) == ("bfloat16", torch.bfloat16, torch.float32)
    assert (found.trials[0].min_cosine or 0) > 0.999


def test_a_dtype_that_drifts_is_not_chosen(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that calls bfloat16 ten times faster, so that only the drift speaks against it.
    fast = {"float32": {1: 1.0, 8: 1.0}, "bfloat16": {1: 10.0, 8: 10.0}}
    monkeypatch.setattr(dtype_module, "_time", lambda candidates, *_: {name: fast[name] for name in candidates})
    monkeypatch.setattr("ironclip.encoder.pays", lambda dtype: False)
    assert choose_dtype(tiny_encoder, "auto")[1].chosen == "bfloat16"
    with monkeypatch.context() as strict:
        strict.setattr(dtype_module, "MIN_COSINE", 0.9999999)
        _, report = choose_dtype(tiny_encoder, "auto")
    assert report.chosen == "float32"
    assert "drift" in str(report.trials[1].rejected)
    fast["bfloat16"][8] = 1.05
    assert "not worth it" in str(choose_dtype(tiny_encoder, "auto")[1].trials[1].rejected)


def test_a_pinned_dtype_is_kept_and_an_unknown_one_refused(tiny_encoder: Encoder) -> None:
    async def scenario(served: ServedEncoder) -> None:
        assert served.dtype == "bfloat16"
        (image,) = pictures(1)
        (rows,) = await served.encode_images([image], NONE)
        assert isinstance(rows, Tensor)
        assert rows.dtype == torch.float32
        with torch.no_grad():
            exact = tiny_encoder.encode_image(to_float(image[None]))
        assert cosine_similarity(rows, exact).item() > 0.999

    serve(tiny_encoder, scenario, dtype="bfloat16")
    with pytest.raises(OptionError):
        choose_dtype(tiny_encoder, "int4")


@pytest.mark.slow
def test_vit_b_32_is_served_in_the_faster_dtype() -> None:
    served = ServedEncoder("big", load_encoder("random:ViT-B-32"), max_batch=4)
    served.start()
    report = served.dtype_report
    assert all((trial.min_cosine or 0) > 0.999 for trial in report.trials if trial.images_per_second)

    async def scenario() -> None:
        image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
        rows, again = await served.encode_images([image, image], NONE)
        assert isinstance(rows, Tensor)
        assert isinstance(again, Tensor)
        assert rows.shape == (1, 512)
        torch.testing.assert_close(rows, again)
        await served.stop()

    asyncio.run(scenario())


def test_a_stop_comes_to_an_end_where_the_worker_hangs_and_a_probe_waits(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_HANG", 0.2)

    async def run() -> None:
        served = ServedEncoder("tiny", tiny_encoder, dtype="float32", places=Places(4))
        served.start()
        assert served.prober is not None
        gate = threading.Event()
        served.images._attempts._run = lambda items: gate.wait(60) and []  # type: ignore[assignment,return-value]
        lost = asyncio.create_task(served.encode_images(pictures(1), NONE))
        await asyncio.sleep(0.1)
        job = Job(lambda: pytest.fail("it is not begun"), asyncio.get_running_loop(), seconds=60)
        served.prober.submit(job)
        await asyncio.wait_for(served.stop(), 15)
        await asyncio.wait_for(job.wait(), 1)
        assert (job.status, type(job.error)) == ("failed", NotReady)
        (outcome,) = await asyncio.wait_for(lost, 1)
        assert isinstance(outcome, NotReady)
        gate.set()

    asyncio.run(run())


def test_what_does_not_come_to_serve_leaves_no_weights_behind(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(Settings(encoders={"tiny": str(tiny_artifact)}, state_dir=tmp_path, dtype="float32"), lambda: False)
    version = Version("tiny", str(tiny_artifact), str(tiny_artifact), "api", NONE)
    loaded = loader.load(version)
    weights = [weakref.ref(weight) for weight in loaded.encoder.parameters()]
    assert len(weights) > 10

    def start(self: ServedEncoder) -> None:
        self.tower.run(self._blanks(1))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ServedEncoder, "start", start)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            loader.warm(version, loaded)
        del loaded
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_said_where_there_is_no_memory(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory

"""Batches on their way to the device and back: copied ahead, filled up to fixed sizes, each row its picture's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.precision import exact_float32, keep_float32_exact
from ironclip.preprocessing import to_float
from service.batching import Batcher
from service.forwards import FixedForwards, choose_forward
from service.runtime import ServedEncoder
from service.staging import Staging
from service.tower import ImageJob, ImageTower
from service.urgency import BATCH, CURRENT, Urgency
from tests.conftest import make_residual_encoder, make_tiny_encoder

NONE = make_defence()
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=cuda)]


def pictures(count: int, seed: int = 0, side: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator))


def static(encoder: Encoder, pixels: Tensor) -> Callable[[], Tensor]:
    """A forward as a graph has it: it reads one buffer and overwrites one answer."""
    answer = torch.empty(len(pixels), encoder.dim, device=pixels.device)

    def replay() -> Tensor:
        return answer.copy_(encoder.encode_image(pixels))

    return replay


def in_a_thread(work: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_copied_ahead_is_what_is_asked_for(device: str) -> None:
    staging = Staging(torch.device(device), 4, (3, 32, 32))
    some = pictures(9)

    def taken(*numbers: int) -> None:
        found = staging.take([some[i] for i in numbers])
        torch.testing.assert_close(found.cpu(), torch.stack([some[i] for i in numbers]), rtol=0, atol=0)

    taken(0, 1, 2)
    staging.prepare(some[3:9])  # more than there is room for
    taken(3, 4, 5, 6)
    assert (staging.hits, staging.misses) == (4, 3)
    staging.prepare(some[0:4])
    taken(3, 8, 0)  # another order, and one that was not foreseen, for which there is no room left
    staging.prepare(some[0:2])
    staging.prepare(some[0:3])  # one more has come meanwhile
    taken(2, 0, 5)
    taken(7, 7, 1, 7)  # one picture twice
    staging.prepare([torch.zeros(3, 31, 31, dtype=torch.uint8), torch.zeros(3, 1, 1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="31"):
        staging.take([some[0], torch.zeros(3, 31, 31, dtype=torch.uint8)])
    taken(1, 0)
    with pytest.raises(ValueError, match="at most 4"):
        staging.take(some[:5])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_their_pictures_own_through_staging_and_fixed_sizes(device: str) -> None:
    """Any number of pictures, through defences of one view, of several, and with gradients of its own."""
    encoder = make_tiny_encoder().requires_grad_(False).to(device)
    shares: list[float] = []
    queue: list[ImageJob] = []
    tower = ImageTower(
        encoder,
        8,
        forwards=FixedForwards(encoder, [1, 2, 4, 8], static),
        upcoming=lambda: queue,
        on_padding=shares.append,
        ahead=True,
    )
    plain = ImageTower(encoder, 8, ahead=False)
    defences = [NONE, make_defence("cola", {"views": 3}), make_defence("ttc", {"steps": 1})]
    for count in (1, 3, 5, 8):
        images = pictures(count, seed=count)
        batch = [ImageJob(image, defences[i % 3]) for i, image in enumerate(images)]
        batch[-1] = ImageJob(to_float(images[-1]), batch[-1].defence)
        queue[:] = [ImageJob(image, NONE) for image in pictures(4, seed=50)]
        for found, expected in zip(tower.run(batch), plain.run(batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert found.untyped_storage().nbytes() == found.nbytes
            assert not found.requires_grad
        tower.run(queue)
    assert tower.staging is not None
    assert tower.staging.hits == 16
    assert {0.0, 0.25} <= set(shares)  # 3 views in 4 rows
    torch.testing.assert_close(torch.cat(tower.run(queue)), torch.cat(plain.run(queue)), rtol=1e-4, atol=1e-5)


def test_a_thread_that_takes_over_shares_no_buffer_with_the_one_that_hangs(tiny_encoder: Encoder) -> None:
    forwards = FixedForwards(tiny_encoder, [1, 2], static)
    tower = ImageTower(tiny_encoder, 2, forwards=forwards, ahead=True)
    (job,) = [ImageJob(image, NONE) for image in pictures(1)]
    (expected,) = tower.run([job])
    before = tower.staging
    assert forwards.usable()
    assert in_a_thread(forwards.usable) is False  # this thread lives: it may write into the buffer
    (found,) = in_a_thread(lambda: tower.run([job]))  # type: ignore[misc]
    torch.testing.assert_close(found, expected)
    assert tower.staging is not before
    forwards.release()
    assert in_a_thread(forwards.usable) is True
    assert forwards.usable()  # that one has ended


def test_sizes_that_memory_does_not_suffice_for_are_left_out_and_said(tiny_encoder: Encoder) -> None:
    def scarce(encoder: Encoder, pixels: Tensor) -> Callable[[], Tensor]:
        if len(pixels) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return static(encoder, pixels)

    forwards, report = choose_forward(tiny_encoder, "compile", sizes=[1, 2, 4, 8], seconds=0, maker=scarce)
    assert forwards is not None
    assert report.sizes == (1, 2)
    assert report.skipped == {4: "not enough memory", 8: "not enough memory"}
    tower = ImageTower(tiny_encoder, 8, forwards=forwards)
    jobs = [ImageJob(image, NONE) for image in pictures(5)]
    torch.testing.assert_close(torch.cat(tower.run(jobs)), torch.cat(ImageTower(tiny_encoder, 8).run(jobs)))

    def refused(encoder: Encoder, pixels: Tensor) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    forwards, report = choose_forward(tiny_encoder, "compile", sizes=[1, 2], maker=refused)
    assert forwards is None
    assert report.chosen == "off"
    assert "not permitted" in report.skipped[2]


def test_a_forward_that_comes_to_something_else_is_not_taken_even_if_asked_for(tiny_encoder: Encoder) -> None:
    def wrong(encoder: Encoder, pixels: Tensor) -> Callable[[], Tensor]:
        return lambda: encoder.encode_image(pixels.flip(0))

    forwards, report = choose_forward(tiny_encoder, "compile", sizes=[1, 4], seconds=0, maker=wrong)
    assert forwards is None
    assert "drift" in report.why
    assert report.to_json()["chosen"] == "off"
    with pytest.raises(OptionError, match="CUDA"):
        choose_forward(tiny_encoder, "graphs", sizes=[1])
    assert choose_forward(tiny_encoder, "auto", sizes=[1])[1].chosen == "off"
    with pytest.raises(OptionError, match="auto, off"):
        choose_forward(tiny_encoder, "jit", sizes=[1])


def test_what_waits_is_copied_while_a_batch_runs_and_who_comes_late_is_still_let_in() -> None:
    """The batch is cut when the worker is free, whatever was made ready before: nobody waits a batch longer."""
    foreseen: list[list[int]] = []
    batches: list[list[int]] = []

    async def scenario() -> None:
        loop, late = asyncio.get_running_loop(), asyncio.Event()

        def run(items: list[int]) -> list[int]:
            if not batches:
                running.set()
                assert queued.wait(10)
            foreseen.append(batcher.upcoming())
            if not batches:  # what was foreseen has been copied; now somebody urgent comes
                loop.call_soon_threadsafe(late.set)
                assert urgent.wait(10)
            batches.append(list(items))
            return items

        running, queued, urgent = threading.Event(), threading.Event(), threading.Event()
        batcher: Batcher[int, int] = Batcher("test", run, max_batch=3, idle_wait_ms=0)  # type: ignore[arg-type]
        batcher.start()
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(running.wait, 10)
        waiting = [asyncio.create_task(batcher.submit(i)) for i in (1, 2)]
        CURRENT.set(Urgency(BATCH))
        waiting += [asyncio.create_task(batcher.submit(i)) for i in (3, 4)]
        await asyncio.sleep(0)
        queued.set()
        await late.wait()
        CURRENT.set(Urgency())
        waiting.append(asyncio.create_task(batcher.submit(5)))
        await asyncio.sleep(0)
        urgent.set()
        await asyncio.gather(first, *waiting)
        await batcher.stop()

    asyncio.run(scenario())
    assert foreseen[0] == [1, 2, 3]
    assert batches == [[0], [1, 2, 5], [3, 4]]


def test_gradients_are_exact_whatever_the_process_has_set() -> None:
    """On a CPU with bfloat16 arithmetic `medium` rounds products; on a GPU convolutions use TF32 unless told not to."""
    holders = torch.backends.mkldnn.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if not hasattr(holders[0], "fp32_precision"):
        pytest.skip("this PyTorch has other switches")
    before = [holder.fp32_precision for holder in holders]
    a = torch.rand(128, 128, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()

    def error() -> float:
        return float(((a @ a).double() - exact).abs().max())

    try:
        holders[0].fp32_precision, holders[1].fp32_precision = "bf16", "tf32"
        rough = error()
        with exact_float32():
            with exact_float32():
                assert error() < 1e-4
            assert error() < 1e-4
            assert holders[1].fp32_precision == "ieee"
        assert [holder.fp32_precision for holder in holders] == ["bf16", "tf32"]
        assert error() == rough
        with exact_float32():
            keep_float32_exact()
        assert error() < 1e-4
        assert holders[1].fp32_precision == "ieee"
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.fp32_precision = value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_tower_answers_alike(tiny_encoder: Encoder) -> None:
    async def scenario() -> None:
        served = ServedEncoder("tiny", tiny_encoder, dtype="float32", forward="compile", max_batch=2)
        assert served.forward_report.chosen == "compile", served.forward_report
        served.start()
        images = pictures(5)
        rows = await served.encode_images(images, NONE)
        expected = tiny_encoder.encode_image(to_float(torch.stack(images)))
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
        await served.stop()

    asyncio.run(scenario())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("make", [make_tiny_encoder, make_residual_encoder])
def test_graphs_answer_alike_under_load(make: Callable[[], Encoder]) -> None:
    encoder = make().requires_grad_(False)
    images = pictures(200, side=encoder.resolution)
    with torch.no_grad():
        expected = encoder.encode_image(to_float(torch.stack(images)))

    async def scenario() -> None:
        served = ServedEncoder("small", encoder.to("cuda"), dtype="float32", forward="graphs", max_batch=16)
        assert served.forward_report.chosen == "graphs", served.forward_report
        served.start()
        requests = [served.encode_images([image], NONE) for image in images]
        rows = [row for (row,) in await asyncio.gather(*requests)]
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
        assert served.tower.staging is not None
        assert served.tower.staging.hits > 0
        await served.stop()

    asyncio.run(scenario())


def test_a_tower_that_loses_a_row_gives_nobody_another_ones(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures of two views: three features would be cut into wrong rows without a word."""
    tower = ImageTower(tiny_encoder, 4)
    defence = make_defence("cola", {"views": 2})
    whole = tiny_encoder.encode_image
    monkeypatch.setattr(tower.encoder, "encode_image", lambda pixels: whole(pixels)[: len(pixels) // 2])
    with pytest.raises(RuntimeError, match="2 features for 4 views"):
        tower.run([ImageJob(picture, defence) for picture in pictures(2, side=tiny_encoder.resolution)])

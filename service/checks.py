"""The checks of `python -m service selfcheck`: each asks a `ServedEncoder` as a request would.

A check is PASS or FAIL with what to do; what is measured on the way stands beside it, for programs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ironclip import __version__
from ironclip.defences import make_defence
from ironclip.precision import exact_float32
from ironclip.preprocessing import to_float
from service.dtype import wait_for
from service.runtime import ServedEncoder
from service.warming import batch_sizes

# Least cosine of a picture's features with those of float32, and with its own in another batch.
_ALIKE = 0.999
# Of the tower's own speed, what must come through queue, batcher and threads.
_LEAST_SHARE = 0.7
# Largest relative error of a float32 product: TF32's is a thousand times as large.
_EXACT = 1e-5


@dataclass(frozen=True)
class Check:
    """One thing that holds or does not.

    Attributes:
        name: stable, for programs.
        passed: whether it holds.
        found: what was seen, in words.
        advice: what to do where it does not hold.
    """

    name: str
    passed: bool
    found: str
    advice: str


@dataclass
class Report:
    """What was found: `measured` is for programs, `checks` decide the exit status."""

    measured: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "ironclip": __version__,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            **self.measured,
        }


async def check_all(report: Report, served: ServedEncoder, seconds: float, say: Callable[[str], None]) -> None:
    """Go through all checks, and stop the encoder.

    Args:
        report: where what is found goes.
        served: started.
        seconds: for measuring the throughput.
        say: told what is being done.
    """
    try:
        for what, check in (
            ("float32", _float32),
            ("dtype", _dtype),
            ("forward", _forward),
            ("own features", _own_features),
            ("texts", _texts),
            ("determinism", _determinism),
            ("batch sizes", _batch_sizes),
            ("probes", _probes),
        ):
            say(f"checking {what}")
            await check(report, served)
        say("measuring throughput")
        await _throughput(report, served, seconds)
    finally:
        await served.stop()


def _pictures(served: ServedEncoder, count: int, seed: int = 0) -> list[Tensor]:
    """Pictures of noise at the encoder's resolution, uint8."""
    side = served.encoder.resolution
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator))


async def _encoded(served: ServedEncoder, pictures: Sequence[Tensor]) -> Tensor:
    """Features by the way of a request: float32 [n, dim]."""
    rows = await served.encode_images(pictures, make_defence())
    for row in rows:
        if isinstance(row, Exception):
            raise row
    return torch.cat([row for row in rows if not isinstance(row, Exception)])


async def _float32(report: Report, served: ServedEncoder) -> None:
    """A product in float32 against one in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 512, generator=generator).to(served.encoder.device)
    with exact_float32():
        error = float(((a @ a).double() - a.double() @ a.double()).abs().max() / (a.double() @ a.double()).abs().max())
    report.measured["float32_error"] = error
    report.checks.append(
        Check(
            "float32-is-exact",
            error < _EXACT,
            f"relative error of a product {error:.1e}",
            "Probes take gradients in float32, and this device rounds them: look for NVIDIA_TF32_OVERRIDE and "
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE in the environment, and unset them.",
        )
    )


async def _dtype(report: Report, served: ServedEncoder) -> None:
    chosen = next(trial for trial in served.dtype_report.trials if trial.dtype == served.dtype_report.chosen)
    report.checks.append(
        Check(
            "dtype-keeps-features",
            (chosen.min_cosine or 0.0) >= _ALIKE,
            f"{chosen.dtype}: least cosine with float32 {chosen.min_cosine or 0.0:.6f}",
            "IRONCLIP_DTYPE pins a dtype that this encoder does not stand: use auto or float32.",
        )
    )


async def _forward(report: Report, served: ServedEncoder) -> None:
    found = served.forward_report
    as_asked = found.requested in ("auto", found.chosen) and not found.skipped
    skipped = "".join(f"; none for {size}: {why}" for size, why in found.skipped.items())
    report.checks.append(
        Check(
            "forward-as-asked",
            as_asked,
            f"{found.chosen} (asked for: {found.requested}){': ' + found.why if found.why else ''}{skipped}",
            "Not enough memory: lower IRONCLIP_MAX_BATCH. Else set IRONCLIP_COMPILE=off and report what stands here.",
        )
    )


async def _own_features(report: Report, served: ServedEncoder) -> None:
    """Each of many pictures, asked for at once, has its own features: those of the library in float32."""
    count = min(3 * served.max_batch + 1, 97)
    pictures = _pictures(served, count)
    requests = [_encoded(served, pictures[i : i + 3]) for i in range(0, count, 3)]
    found = normalize(torch.cat(await asyncio.gather(*requests)), dim=-1)
    encoder, expected = served.attacked, []
    with torch.inference_mode(), exact_float32():
        for part in torch.split(torch.stack(pictures), 16):
            expected.append(encoder.encode_image(to_float(part).to(encoder.device)).cpu())
    cosines = found @ normalize(torch.cat(expected), dim=-1).T
    own = float(cosines.diagonal().min())
    nearest = int((cosines.argmax(1) == torch.arange(count)).sum())
    report.measured["own_features"] = {"pictures": count, "min_cosine": own, "nearest_is_own": nearest}
    report.checks.append(
        Check(
            "features-are-the-pictures-own",
            own >= _ALIKE,
            f"{count} pictures at once: least cosine with the library's float32 {own:.6f}, {nearest} nearest their own",
            "Try IRONCLIP_COMPILE=off, then IRONCLIP_DTYPE=float32, and report which of them mends it: do not serve.",
        )
    )


async def _texts(report: Report, served: ServedEncoder) -> None:
    texts = ["a photo of a dog.", "an emoji of carrot", "x", "a long, winding sentence about nothing much at all"]
    rows = [row for row in await served.encode_texts(texts, truncate=True) if isinstance(row, torch.Tensor)]
    with torch.inference_mode():
        expected = served.attacked.encode_text(texts, truncate=True).cpu()
    least = float(cosine_similarity(torch.stack(rows), expected).min()) if len(rows) == len(texts) else float("nan")
    report.measured["text_min_cosine"] = least
    report.checks.append(
        Check(
            "texts-keep-features",
            least >= _ALIKE,
            f"{served.dtype}: least cosine of texts with float32 {least:.6f}",
            "The text tower does not stand this dtype: set IRONCLIP_DTYPE=float32 (or bfloat16 in place of float16).",
        )
    )


async def _determinism(report: Report, served: ServedEncoder) -> None:
    """One picture alone, twice, and among others in batches of odd and of full size."""
    (picture,) = _pictures(served, 1, seed=1)
    alone, again = await _encoded(served, [picture]), await _encoded(served, [picture])
    report.measured["determinism"] = {"alone_twice": float((alone - again).abs().max())}
    sizes = sorted({min(3, served.max_batch), served.max_batch})
    worst = 1.0
    for size in sizes:
        among = (await _encoded(served, [*_pictures(served, size - 1, seed=2), picture]))[-1:]
        cosine, difference = float(cosine_similarity(alone, among)), float((alone - among).abs().max())
        report.measured["determinism"][f"in_{size}"] = {"cosine": cosine, "max_difference": difference}
        worst = min(worst, cosine)
    report.checks.append(
        Check(
            "a-batch-changes-nothing",
            worst >= _ALIKE,
            f"alone and in a batch: least cosine {worst:.7f}; alone twice: largest difference "
            f"{report.measured['determinism']['alone_twice']:.1e}",
            "What shares a batch changes the answer: try IRONCLIP_DTYPE=float32, IRONCLIP_COMPILE=off, and report it.",
        )
    )


async def _batch_sizes(report: Report, served: ServedEncoder) -> None:
    """How long a batch of each of some sizes takes, from pixels on the host to features on the host."""
    times: dict[str, dict[str, float]] = {}
    for size in batch_sizes(served.max_batch):
        pictures = _pictures(served, size)
        took = [await _timed(_encoded(served, pictures)) for _ in range(3)]
        times[str(size)] = {
            "milliseconds": round(1000 * min(took), 2),
            "images_per_second": round(size / min(took), 1),
        }
    report.measured["batches"] = times


async def _timed(work: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def _probes(report: Report, served: ServedEncoder) -> None:
    found = served.probe_report
    if not found:
        return
    report.checks.append(
        Check(
            "a-probe-fits-its-quantum",
            found["piece_ms"] <= found["quantum_ms"],
            f"{found['rows']:g} rows in {found['piece_ms']:g} ms, quantum {found['quantum_ms']:g} ms",
            "One step of a probe takes longer than a classification is to wait: raise IRONCLIP_PROBE_QUANTUM_MS or "
            "IRONCLIP_MAX_BATCH, or serve probes from replicas of their own.",
        )
    )


async def _throughput(report: Report, served: ServedEncoder, seconds: float) -> None:
    """Pictures a second through the queue, against the tower alone on pixels that are there; in turns."""
    tower: list[float] = []
    batcher: list[float] = []
    pictures = _pictures(served, served.max_batch)
    full = await _timed(_encoded(served, pictures))
    batches = max(2, min(200, round(seconds / 9 / full)))  # of each of three stretches in a round
    count = batches * served.max_batch
    began = time.perf_counter()
    while len(tower) < 2 or (time.perf_counter() - began < seconds and len(tower) < 25):
        # Of the tower a stretch before and after: the machine may be slower a moment later.
        before = await asyncio.to_thread(_floor, served, pictures, count)
        took = await _timed(_sent(served, pictures, batches))
        after = await asyncio.to_thread(_floor, served, pictures, count)
        tower.append(2 * count / (before + after))
        batcher.append(count / took)
    share = statistics.median(ours / bare for ours, bare in zip(batcher, tower, strict=True))
    report.measured["throughput"] = {
        "tower_images_per_second": round(statistics.median(tower), 1),
        "batcher_images_per_second": round(statistics.median(batcher), 1),
        "share_of_tower": round(share, 3),
        "rounds": len(tower),
    }
    report.checks.append(
        Check(
            "throughput-near-the-floor",
            share >= _LEAST_SHARE,
            f"{statistics.median(batcher):.1f} images/s through the batcher, {statistics.median(tower):.1f} by the "
            f"tower alone: {share:.0%}",
            f"Less than {_LEAST_SHARE:.0%} of the tower comes through: is other work on this machine? Else raise "
            "IRONCLIP_MAX_BATCH, so that each batch is worth its overhead.",
        )
    )


async def _sent(served: ServedEncoder, pictures: Sequence[Tensor], each: int) -> None:
    """As from as many callers as a batch has pictures, each with its next picture as soon as it is answered."""

    async def caller(picture: Tensor) -> None:
        for _ in range(each):
            await _encoded(served, [picture])

    await asyncio.gather(*(caller(picture) for picture in pictures))


def _floor(served: ServedEncoder, pictures: Sequence[Tensor], count: int) -> float:
    """Seconds of the bare tower for so many pictures, in full batches; nothing else runs meanwhile."""
    device, forwards = served.encoder.device, served.tower.forwards
    size = forwards.size_for(len(pictures)) if forwards is not None else None
    with torch.inference_mode():
        batch = to_float(torch.stack(list(pictures)).to(device))
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count // len(pictures)):
            # Not `tower.forward`, which would see that this is not its worker's thread.
            served.encoder.encode_image(batch) if forwards is None or size is None else forwards(batch, size)
        wait_for(device)
        return time.perf_counter() - began

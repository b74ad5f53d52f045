"""Which dtype an encoder computes in: measured at start-up on this machine, and held to float32's features.

Candidates hold their weights in the dtype itself. Left out on purpose: autocast on the CPU, which copies weights
at every call and is slower than float32, and `torch.set_float32_matmul_precision("medium")`, which is about half
as fast as bfloat16 weights and, being process-wide, would take the float32 out of the gradients of an attack. TF32 is
left out for the same reason: its switch is read by every thread, and on the GPUs that have it float16, with as many
bits of a number, and bfloat16 are twice as fast. So float32 means float32 everywhere (`ironclip.precision`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from ironclip.dtypes import DTYPES
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.loading import DEMO_FOLDER
from ironclip.preprocessing import load_image, to_float

# What `auto` tries. int8 is for the user to choose: it is not held to what an attack found in another dtype.
_TRIED = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
# Least cosine of a picture's features with float32's. An error of 0.999 that points anywhere moves a logit of a
# 512-dimensional CLIP (scale 100) by about 0.2; bfloat16 stays near 0.9999.
MIN_COSINE = 0.999
# A dtype that drifts must be worth it.
MIN_SPEEDUP = 1.1
# Who is so many times as fast as the next needs no further round.
_CLEAR = 1.5
# Batches that speeds are taken at. A GPU runs 8 pictures of a small tower faster than Python launches the kernels: all
# dtypes would look alike.
_BATCH_SIZES = {"cpu": (1, 8), "cuda": (1, 64)}
_SEED = 20


@dataclass(frozen=True)
class Trial:
    """One candidate: its speed by batch size (images/s, best of the rounds), drift, and why it was not taken.

    One that was not tried has neither speed nor drift, and one that had no other to be compared with no speed.
    """

    dtype: str
    images_per_second: dict[int, float] = field(default_factory=dict)
    min_cosine: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class DtypeReport:
    """How a dtype was chosen; kept for `GET /models`."""

    requested: str
    chosen: str
    threads: int
    min_cosine_allowed: float = MIN_COSINE
    trials: list[Trial] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, speeds in images per second."""
        trials = [
            {
                "dtype": trial.dtype,
                "images_per_second": {str(n): round(speed, 2) for n, speed in trial.images_per_second.items()},
                "min_cosine": None if trial.min_cosine is None else round(trial.min_cosine, 6),
                "rejected": trial.rejected,
            }
            for trial in self.trials
        ]
        return {
            "requested": self.requested,
            "chosen": self.chosen,
            "threads": self.threads,
            "min_cosine_allowed": self.min_cosine_allowed,
            "trials": trials,
        }


def choose_dtype(encoder: Encoder, requested: str = "auto", *, seconds: float = 2.0) -> tuple[Encoder, DtypeReport]:
    """Return the encoder in the dtype to serve it in, and how that was found out.

    Args:
        encoder: in float32, on its device.
        requested: 'auto' measures; another of DTYPES is taken as given, its drift still reported.
        seconds: budget of the timing; at least two rounds are run however slow the machine is, and no more where one
            is clearly the fastest.

    Raises:
        OptionError: no such dtype, or none for this device or tower.
    """
    if requested != "auto" and requested not in DTYPES:
        raise OptionError(f"dtype is one of auto, {', '.join(DTYPES)}; not {requested!r}.")
    tried = _TRIED.get(encoder.device.type, _TRIED["cuda"]) if requested == "auto" else (requested,)
    names = [name for name in tried if requested != "auto" or not encoder.upcasts(getattr(torch, name))]
    candidates = {name: encoder.served(getattr(torch, name)) for name in names}
    pictures = drift_pictures(encoder) if any(one is not encoder for one in candidates.values()) else None
    cosines = _least_cosines(encoder, candidates, pictures)
    sizes = _BATCH_SIZES.get(encoder.device.type, _BATCH_SIZES["cpu"])
    speeds: dict[str, dict[int, float]] = {name: {} for name in names}
    if pictures is not None and len(candidates) > 1:
        speeds = _time(candidates, pictures, sizes, seconds)
    trials = [_judge(name, speeds, cosines[name], requested) for name in names]
    chosen = requested
    if requested == "auto":
        lacking = "this CPU has no arithmetic for it: products would be made in float32"
        trials += [Trial(name, rejected=lacking) for name in tried if name not in names]
        sound = [trial for trial in trials if trial.rejected is None]
        chosen = max(sound, key=lambda trial: trial.images_per_second.get(sizes[-1], 0.0)).dtype
    return candidates[chosen], DtypeReport(requested, chosen, torch.get_num_threads(), trials=trials)


def _judge(name: str, speeds: dict[str, dict[int, float]], cosine: float, requested: str) -> Trial:
    rejected = None
    if requested == "auto" and name != "float32":
        largest = max(speeds[name])
        gain = speeds[name][largest] / speeds["float32"][largest]
        if not cosine >= MIN_COSINE:  # also where it is NaN
            rejected = f"drift: least cosine with float32 is {cosine:.6f}, {MIN_COSINE} is needed"
        elif gain < MIN_SPEEDUP:
            rejected = f"not worth it: {gain:.2f} times the speed of float32"
    return Trial(name, speeds[name], cosine, rejected)


def drift_pictures(encoder: Encoder) -> Tensor:
    """A fixed batch to compare dtypes on: shipped samples, smooth and rough noise; float [8, 3, R, R] in [0, 1]."""
    side = encoder.resolution
    files = sorted((DEMO_FOLDER / "samples").glob("*.[jp][pn]g"))[:4]
    samples = [to_float(encoder.preprocessing(load_image(file))[0]) for file in files]
    generator = torch.Generator().manual_seed(_SEED)
    while len(samples) < 8:
        coarse = torch.rand(1, 3, 4 << (len(samples) % 4), 4 << (len(samples) % 4), generator=generator)
        samples.append(interpolate(coarse, (side, side), mode="bilinear")[0])
    return torch.stack(samples).to(encoder.device)


@torch.inference_mode()
def _least_cosines(reference: Encoder, candidates: dict[str, Encoder], pictures: Tensor | None) -> dict[str, float]:
    """Of each candidate; the reference itself has no drift, and without pictures there are no others."""
    cosines = dict.fromkeys(candidates, 1.0)
    if pictures is not None:
        exact = reference.encode_image(pictures)
        for name, candidate in candidates.items():
            if candidate is not reference:
                cosine = cosine_similarity(exact, candidate.encode_image(pictures))
                cosines[name] = float(cosine.min()) if bool(cosine.isfinite().all()) else float("nan")
    return cosines


@torch.inference_mode()
def _time(
    candidates: dict[str, Encoder], pictures: Tensor, sizes: tuple[int, ...], seconds: float
) -> dict[str, dict[int, float]]:
    """Images per second of each candidate by batch size, taken in turns so that a busy spell hits all alike."""
    best = {name: dict.fromkeys(sizes, float("inf")) for name in candidates}
    pictures = pictures.repeat(-(-max(sizes) // len(pictures)), 1, 1, 1)
    for encoder in candidates.values():
        for size in sizes:
            encoder.encode_image(pictures[:size])
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or (time.perf_counter() - began < seconds and rounds < 50 and not _clear(best, sizes[-1])):
        for name, encoder in candidates.items():
            for size in sizes:
                best[name][size] = min(best[name][size], _once(encoder, pictures[:size]))
        rounds += 1
    return {name: {size: size / times for size, times in sizes.items()} for name, sizes in best.items()}


def _clear(best: dict[str, dict[int, float]], size: int) -> bool:
    """Whether the fastest needs no further round."""
    quickest, second = sorted(times[size] for times in best.values())[:2]
    return second > _CLEAR * quickest


def _once(encoder: Encoder, pictures: Tensor) -> float:
    wait_for(pictures.device)
    began = time.perf_counter()
    encoder.encode_image(pictures)
    wait_for(pictures.device)
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

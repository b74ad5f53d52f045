"""The image tower's forward in fixed batch sizes: CUDA graphs, or torch.compile, held to the plain forward.

A forward of a small tower is several hundred kernels, and Python needs longer to launch them than a fast GPU to run
them. A CUDA graph launches them at once, but for one shape over one buffer: a batch is copied into it, filled up to the
next size that was captured, and the answers are cut back. Sizes without a graph are run plainly, and so is whatever
takes gradients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from service.dtype import drift_pictures, wait_for

_LOG = logging.getLogger("ironclip.service.forwards")
CHOICES = ("auto", "off", "graphs", "compile")
# Least cosine with the plain forward of the same dtype. A graph replays the same kernels; a compiler rounds elsewhere,
# and is allowed what a dtype is.
MIN_COSINE = {"graphs": 0.9999, "compile": 0.999}
# `auto` takes what is so many times as fast, for a batch of one or for a full one, and slower for neither.
MIN_SPEEDUP = 1.05
_SLOWER = 0.97

# Runs the forward over its static input; the answer belongs to it and is overwritten by the next run.
Replay = Callable[[], Tensor]


class Maker(Protocol):
    """Makes the forward of one size."""

    def __call__(self, encoder: Encoder, pixels: Tensor) -> Replay:
        """A forward over just this tensor, float32 [n, 3, R, R], whatever is written into it later."""


@dataclass(frozen=True)
class ForwardReport:
    """How the forward was chosen; kept for `GET /models`.

    Attributes:
        requested, chosen: of CHOICES; chosen is `off` for the plain forward.
        why: the choice in words, where there was one.
        sizes: batches that have a forward of their own.
        skipped: sizes that have none, and why.
        milliseconds: of a batch, by size: the plain forward's, and that of the one that was tried.
        min_cosine, max_difference: to the plain forward's features.
    """

    requested: str
    chosen: str
    why: str = ""
    sizes: tuple[int, ...] = ()
    skipped: dict[int, str] = field(default_factory=dict)
    milliseconds: dict[int, tuple[float, float]] = field(default_factory=dict)
    min_cosine: float | None = None
    max_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "requested": self.requested,
            "chosen": self.chosen,
            "why": self.why,
            "sizes": list(self.sizes),
            "skipped": {str(size): why for size, why in self.skipped.items()},
            "milliseconds": {
                str(size): {"plain": round(plain, 3), "tried": round(other, 3)}
                for size, (plain, other) in self.milliseconds.items()
            },
            "min_cosine": self.min_cosine,
            "max_difference": self.max_difference,
        }


class FixedForwards:
    """Forwards of fixed sizes over one input buffer, for one thread at a time.

    The first thread that asks owns the buffer as long as it lives. Another one, which takes over from a thread that
    hangs, is told that it is not its own (`usable`) and runs plainly: what hangs may wake up and write.

    Args:
        encoder: whose `encode_image` they are.
        sizes: of batches.
        make: makes one.
    """

    def __init__(self, encoder: Encoder, sizes: Sequence[int], make: Maker) -> None:
        side = encoder.resolution
        self.skipped: dict[int, str] = {}
        self._replays: dict[int, Replay] = {}
        self._owner: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pixels = torch.zeros(max(sizes), 3, side, side, device=encoder.device)
        # The largest first: the smaller ones then live in the memory that it needed.
        for size in sorted(sizes, reverse=True):
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._replays[size] = make(encoder, self._pixels[:size])
            except Exception as error:
                memory = _no_memory(error)
                self.skipped[size] = "not enough memory" if memory else f"{type(error).__name__}: {_line(error)}"
                _LOG.warning("no forward of its own for batches of %d: %s", size, self.skipped[size])
                if not memory:  # what is wrong with one size is wrong with all
                    self._replays.clear()
                    break
        self.sizes = tuple(sorted(self._replays))

    def size_for(self, count: int) -> int | None:
        """The smallest size that holds so many, or None."""
        return next((size for size in self.sizes if size >= count), None)

    def usable(self) -> bool:
        """Whether the buffer is this thread's."""
        with self._lock:
            if self._owner is None or not self._owner.is_alive():
                self._owner = threading.current_thread()
            return self._owner is threading.current_thread()

    def release(self) -> None:
        """Let the next thread that asks own the buffer."""
        with self._lock:
            self._owner = None

    def __call__(self, pixels: Tensor, size: int) -> Tensor:
        """Features of pixels as for `encode_image`, by the forward of ``size``; a tensor of its own, no gradients."""
        count = len(pixels)
        with torch.inference_mode(False), torch.no_grad():
            self._pixels[:count].copy_(pixels)
            return self._replays[size]()[:count].clone()


def graph_maker(device: torch.device) -> Maker:
    """Captures CUDA graphs that share their memory."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def make(encoder: Encoder, pixels: Tensor) -> Replay:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose and set up their kernels first, which cannot be captured
                    encoder.encode_image(pixels)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may be serving another encoder on this device: only this thread's calls are forbidden.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                features = encoder.encode_image(pixels)

        def replay() -> Tensor:
            graph.replay()
            return features

        return replay

    return make


def compile_maker() -> Maker:
    """Compiles the forward for each size."""

    def make(encoder: Encoder, pixels: Tensor) -> Replay:
        forward = torch.compile(encoder.encode_image, dynamic=False)
        forward(pixels)
        return lambda: forward(pixels)

    return make


def choose_forward(
    encoder: Encoder, requested: str = "auto", *, sizes: Sequence[int], seconds: float = 1.0, maker: Maker | None = None
) -> tuple[FixedForwards | None, ForwardReport]:
    """Return the forwards to serve with, None for the plain one, and how that was found out.

    Args:
        encoder: as it is served.
        requested: one of CHOICES. `auto` is graphs on a GPU where they are faster and come to the same, else off. What
            is asked for by name is taken unless it comes to something else.
        sizes: of batches.
        seconds: budget of the timing.
        maker: in place of the one that belongs to the choice.

    Raises:
        OptionError: no such choice, or graphs without a GPU.
    """
    if requested not in CHOICES:
        raise OptionError(f"compile is one of {', '.join(CHOICES)}; not {requested!r}.")
    on_gpu = encoder.device.type == "cuda"
    if requested == "off":
        return None, ForwardReport(requested, "off")
    if requested == "auto" and not on_gpu:
        return None, ForwardReport(requested, "off", "graphs are a GPU's; a compiled forward was no faster on a CPU")
    kind = "graphs" if requested == "auto" else requested
    if kind == "graphs" and not on_gpu and maker is None:
        raise OptionError(
            f"IRONCLIP_COMPILE=graphs needs a CUDA GPU, and this encoder is on {encoder.device}: use auto."
        )
    make = maker or (graph_maker(encoder.device) if kind == "graphs" else compile_maker())
    forwards = FixedForwards(encoder, sizes, make)
    skipped = dict(sorted(forwards.skipped.items()))
    if not forwards.sizes:
        return None, ForwardReport(requested, "off", f"{kind} could not be made; see skipped", (), skipped)
    cosine, difference = compare(encoder, forwards)
    times = _time(encoder, forwards, seconds)
    why = _reason_against(kind, requested, cosine, times)
    forwards.release()
    return (
        forwards if not why else None,
        ForwardReport(
            requested,
            "off" if why else kind,
            why
            or f"{min(plain / other for plain, other in times.values()):.2f} times the plain forward's speed at least",
            forwards.sizes,
            skipped,
            times,
            round(cosine, 7),
            difference,
        ),
    )


def _reason_against(kind: str, requested: str, cosine: float, times: dict[int, tuple[float, float]]) -> str:
    if not cosine >= MIN_COSINE[kind]:  # also where it is NaN
        return f"drift: least cosine with the plain forward is {cosine:.6f}, {MIN_COSINE[kind]} is needed"
    gains = [plain / other for plain, other in times.values()]
    if requested == "auto" and (max(gains) < MIN_SPEEDUP or min(gains) < _SLOWER):
        return f"not worth it: {min(gains):.2f} to {max(gains):.2f} times the plain forward's speed"
    return ""


@torch.inference_mode()
def compare(encoder: Encoder, forwards: FixedForwards) -> tuple[float, float]:
    """Least cosine and largest difference to the plain forward, over all sizes, each full and one short."""
    pictures = drift_pictures(encoder)
    cosine, difference = 1.0, 0.0
    for size in forwards.sizes:
        batch = pictures.repeat(-(-size // len(pictures)), 1, 1, 1)[:size]
        for count in {size, max(1, size - 1)}:
            plain, other = encoder.encode_image(batch[:count]), forwards(batch[:count], size)
            if not bool(other.isfinite().all()):
                return float("nan"), float("inf")
            cosine = min(cosine, float(cosine_similarity(plain, other).min()))
            difference = max(difference, float((plain - other).abs().max()))
    return cosine, difference


@torch.inference_mode()
def _time(encoder: Encoder, forwards: FixedForwards, seconds: float) -> dict[int, tuple[float, float]]:
    """Milliseconds of the smallest and the largest batch, plainly and not, the best of rounds taken in turns."""
    best = {size: (float("inf"), float("inf")) for size in {forwards.sizes[0], forwards.sizes[-1]}}
    pictures = drift_pictures(encoder)
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - began < seconds and rounds < 100):
        for size, (plain, other) in best.items():
            batch = pictures.repeat(-(-size // len(pictures)), 1, 1, 1)[:size]
            took = _once(encoder.device, lambda batch=batch: encoder.encode_image(batch))  # type: ignore[misc]
            ours = _once(encoder.device, lambda batch=batch, size=size: forwards(batch, size))  # type: ignore[misc]
            best[size] = (min(plain, 1000 * took), min(other, 1000 * ours))
        rounds += 1
    return best


def _once(device: torch.device, work: Callable[[], Tensor]) -> float:
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


def _no_memory(error: Exception) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]

"""One served encoder: its dtype, its warm-up, a batcher for each tower, and the threads that torch runs in.

Every forward pass runs here, in a worker thread, never on the event loop. Features leave as float32, not
normalised, on the CPU; deciding from them is the Classifier's.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironclip.defences import Defence, make_defence
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from ironclip.textbank import TextBank
from service.banks import Banks
from service.batching import Batcher
from service.dtype import choose_dtype
from service.errors import problem
from service.probing import Prober, measured_rows
from service.tokenizing import Tokenizing

# (tower, items, seconds, seconds that the oldest item waited)
BatchObserver = Callable[[str, int, float, float], None]
TOWERS = ("image", "text")
# How much more than for a tower may wait for the tokenizer (which is far quicker than a tower) and for the text
# banks (whose callers wait for a label set once).
_TOKENS_AHEAD = 8
_PROMPTS_AHEAD = 32
_SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class ImageJob:
    """One picture for the image tower: uint8 [3, R, R], and the defence that makes views of it."""

    pixels: Tensor
    defence: Defence

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of one group go through the defence together."""
        return (self.defence.name, *sorted((key, repr(value)) for key, value in self.defence.options().items()))


class ServedEncoder:
    """An encoder behind its batchers.

    Args:
        name: what callers call it.
        encoder: in float32, on its device; given up for a copy in the chosen dtype.
        dtype: 'auto' or a pinned one, see `choose_dtype`.
        max_batch: images, or texts, in one forward pass at most.
        max_queue: items waiting for a tower at most.
        idle_wait_ms: see Batcher.
        defence: of requests that name none; must serve the encoder's head.
        most_probes: that run and wait at most; 0 for an encoder that is not probed.
        quantum_ms: see `IRONCLIP_PROBE_QUANTUM_MS`.
        images_expected: says whether pictures are being decoded at the moment.
        observe: called after each batch, in the worker's thread.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        *,
        dtype: str = "auto",
        max_batch: int = 32,
        max_queue: int = 512,
        idle_wait_ms: float = 2.0,
        defence: Defence | None = None,
        most_probes: int = 0,
        quantum_ms: float = 0.0,
        images_expected: Callable[[], bool] | None = None,
        observe: BatchObserver | None = None,
    ) -> None:
        self.name = name
        self.encoder, self.dtype_report = choose_dtype(encoder, dtype)
        # Gradients are taken in float32, whatever is served: a probe's number must not be the dtype's.
        self.attacked = self.encoder if self.encoder.dtype == torch.float32 else encoder.served(torch.float32)
        # Served weights do not change; the encoder's own property would look at every tensor at each request.
        self.digest = self.encoder.digest
        self.max_batch = max_batch
        self.defence = defence or make_defence()
        self._observe = observe
        self.images: Batcher[ImageJob, Tensor] = Batcher(
            f"{name} image",
            self._run_images,
            max_batch=max_batch,
            max_queue=max_queue,
            idle_wait_ms=idle_wait_ms,
            more_expected=images_expected,
            shares_cores=self.encoder.device.type == "cpu",
            on_batch=self._observer("image"),
            cost=lambda job: job.defence.cost,
            gaps=self,
        )
        self.prober: Prober | None = None
        self.probe_report: dict[str, float] = {}
        self._most_probes, self._quantum = most_probes, quantum_ms / 1000
        self.texts: Batcher[Tensor, Tensor] = Batcher(
            f"{name} text",
            self._run_texts,
            max_batch=max_batch,
            max_queue=max_queue,
            # Texts take no decoding, so none is on its way while the worker idles.
            idle_wait_ms=0,
            on_batch=self._observer("text"),
        )
        self.tokens = Tokenizing(name, self.encoder, max_queue=_TOKENS_AHEAD * max_queue)
        self.banks = Banks(name, self.encoder, self.encode_texts, part=max_batch, max_ahead=_PROMPTS_AHEAD * max_queue)

    @property
    def dtype(self) -> str:
        """Name of the dtype that the towers compute in."""
        return self.dtype_report.chosen

    @property
    def alive(self) -> bool:
        """Whether both workers run."""
        return self.images.alive and self.texts.alive

    @property
    def stalled_seconds(self) -> float:
        """Seconds since a worker that has work last moved."""
        return max(self.images.stalled_seconds, self.texts.stalled_seconds)

    @property
    def pending(self) -> bool:
        """Whether a probe wants a gap between batches."""
        return self.prober is not None and self.prober.pending

    @property
    def urgent(self) -> bool:
        """Whether a probe is to end at once."""
        return self.prober is not None and self.prober.urgent

    def step(self) -> None:
        """Run a piece of a probe."""
        if self.prober is not None:
            self.prober.step()

    def start(self) -> None:
        """Warm up every batch size that is a power of two, and start the workers; blocks until done."""
        side, size = self.encoder.resolution, 1
        with torch.inference_mode():
            while size <= self.max_batch:
                blank = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=self.encoder.device)
                self.encoder.encode_image(to_float(blank))
                size *= 2
            self.encoder.encode_text(["warm"])
        if self._most_probes:
            self._prepare_probes()
        self.images.start()
        self.texts.start()

    def _prepare_probes(self) -> None:
        """Find how much of a probe fits into the quantum, which is fixed from here on."""
        side = self.encoder.resolution
        blank = torch.zeros(self.max_batch, 3, side, side, device=self.encoder.device)
        began = time.perf_counter()
        with torch.inference_mode():
            self.encoder.encode_image(blank).cpu()
        quantum = self._quantum or 1.5 * (time.perf_counter() - began)
        rows, seconds = measured_rows(self.attacked, quantum)
        self.prober = Prober(rows, most=self._most_probes, wake=self.images.nudge, describe=problem)
        self.probe_report = {
            "quantum_ms": round(1000 * quantum, 2),
            "rows": rows.gradient,
            "views": rows.views,
            "piece_ms": round(1000 * seconds, 2),
        }

    async def stop(self, drain: bool = True) -> None:
        """Stop the workers; with `drain`, after what waits has been run. Probes end with what they know."""
        self.tokens.stop()
        if self.prober is not None and self.alive:
            self.prober.stop()
            while self.prober.pending and self.images.alive:
                await asyncio.sleep(0.01)
        await asyncio.gather(self.images.stop(drain), self.texts.stop(drain))

    async def encode_images(self, pixels: Sequence[Tensor], defence: Defence) -> list[Tensor | Exception]:
        """Features of each picture's views.

        Args:
            pixels: uint8 [3, R, R] each.
            defence: makes the views.

        Returns:
            For each picture float32 [views, dim] on the CPU, not normalised, or what went wrong with it.

        Raises:
            Overloaded, NotReady: as `Batcher.submit`.
        """
        return await self.images.submit_many([ImageJob(picture, defence) for picture in pixels])

    async def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> list[Tensor | Exception]:
        """Features of each text: float32 [dim] on the CPU, not normalised, or LabelError for one that is too long.

        Raises:
            Overloaded, NotReady: as `Batcher.submit`.
        """
        tokens = await self.tokens.rows(texts, truncate=truncate)
        readable = [row for row in tokens if isinstance(row, Tensor)]
        features = iter(await self.texts.submit_many(readable))
        return [next(features) if isinstance(row, Tensor) else row for row in tokens]

    async def text_bank(self, label_set: LabelSet, *, descriptions: bool = False) -> TextBank:
        """Encode a label set; callers see to it that each set is asked for once.

        Raises:
            LabelError: a text is too long.
            Overloaded, NotReady: as `Batcher.submit`.
        """
        return await self.banks.build(label_set, descriptions=descriptions)

    def _run_images(self, jobs: Sequence[ImageJob]) -> list[Tensor]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault(job.group, []).append(index)
        features: dict[int, Tensor] = {}
        for members in groups.values():
            rows = self._encode_group([jobs[i].pixels for i in members], jobs[members[0]].defence)
            features.update(zip(members, rows, strict=True))
        return [features[i] for i in range(len(jobs))]

    def _encode_group(self, pixels: list[Tensor], defence: Defence) -> list[Tensor]:
        # Inference mode is the faster one, but inside it a defence could not take gradients.
        with torch.no_grad() if defence.optimising else torch.inference_mode():
            views = defence.make_views(to_float(torch.stack(pixels).to(self.encoder.device)), self.encoder.encode_image)
            rows = self.encoder.encode_image(views.flatten(0, 1)).reshape(*views.shape[:2], -1).cpu()
        # Cloned, so that a row that is kept does not keep its whole batch.
        return [row.clone() for row in rows]

    def _run_texts(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            rows = self.encoder.encode_tokens(torch.stack(list(tokens))).cpu()
        return [row.clone() for row in rows]

    def _observer(self, tower: str) -> Callable[[int, float, float], None] | None:
        observe = self._observe
        if observe is None:
            return None
        return lambda items, seconds, waited: observe(tower, items, seconds, waited)


def load_served_encoder(name: str, spec: str, *, device: str = "auto", **options: Any) -> ServedEncoder:
    """Load an encoder, choose its dtype and warm it up; blocks. `options` are those of ServedEncoder.

    Raises:
        EncoderLoadError, ArtifactError: as `load_encoder`.
        OptionError: the device does not exist.
    """
    served = ServedEncoder(name, load_encoder(spec, device=device), **options)
    served.start()
    return served


def use_threads(threads: int) -> int:
    """Set how many CPU threads one forward pass uses (0 leaves it to torch); returns how many it now uses.

    Also lets threads take the interpreter from each other sooner: a forward pass asks for it a few hundred times,
    and by default waits up to 5 ms each time while the event loop or a decoder is busy.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()

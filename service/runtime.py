"""One served encoder: its dtype, its warm-up, a batcher for each tower, and the threads that torch runs in.

Every forward pass runs here, in a worker thread, never on the event loop. Features leave as float32, not
normalised, on the CPU; deciding from them is the Classifier's.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ironclip.defences import Defence, make_defence
from ironclip.domain import Domain
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet
from ironclip.precision import keep_float32_exact
from ironclip.resources import usable_cpus
from ironclip.textbank import TextBank
from service import telemetry
from service.admission import Room
from service.banks import Banks
from service.batching import Batcher
from service.dtype import choose_dtype
from service.forwards import choose_forward
from service.probe_places import Places
from service.probe_rows import measured_rows
from service.probing import Prober
from service.problems import problem
from service.supervisor import Watched
from service.tokenizing import Tokenizing
from service.tower import ImageJob, ImageTower
from service.warming import batch_sizes, warm

# (tower, items, seconds, seconds that the oldest item waited)
BatchObserver = Callable[[str, int, float, float], None]
TOWERS = ("image", "text")
# How much more than for a tower may wait for the tokenizer (which is far quicker than a tower) and for the text
# banks (whose callers wait for a label set once).
_TOKENS_AHEAD = 8
_PROMPTS_AHEAD = 32
# Texts in the largest batch that is measured at start.
_WARM_TEXTS = 8
_PLAIN = make_defence()
_SWITCH_SECONDS = 0.0005
_SERIALS = itertools.count(1)


class ServedEncoder:
    """An encoder behind its batchers.

    Args:
        name: what callers call it.
        encoder: in float32, on its device; given up for a copy in the chosen dtype.
        dtype: 'auto' or a pinned one, see `choose_dtype`.
        forward: 'auto' or a pinned one, see `choose_forward`.
        max_batch: images, or texts, in one forward pass at most.
        max_queue: items waiting for a tower at most.
        max_wait: seconds of work that may be ahead of a request.
        idle_wait_ms: see Batcher.
        defence: of requests that name none; must serve the encoder's head.
        places: for probes, shared with the other encoders; None for one that is not probed.
        quantum_ms: see `IRONCLIP_PROBE_QUANTUM_MS`.
        images_expected: says whether pictures are being decoded at the moment.
        observe: called after each batch, in the worker's thread.
        supervised: see Batcher.
        domain: what it was trained on, if its artifact says so.

    Attributes:
        serial: tells it from every other one of this process, of the same name and digest too.
        retired: it has been unloaded; nothing that holds it is to be kept.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        *,
        dtype: str = "auto",
        forward: str = "auto",
        max_batch: int = 32,
        max_queue: int = 512,
        max_wait: float = math.inf,
        idle_wait_ms: float = 2.0,
        defence: Defence | None = None,
        places: Places | None = None,
        quantum_ms: float = 0.0,
        images_expected: Callable[[], bool] | None = None,
        observe: BatchObserver | None = None,
        supervised: bool = False,
        domain: Domain | None = None,
    ) -> None:
        self.name = name
        self.serial = next(_SERIALS)
        self.retired = False
        self.domain = domain
        keep_float32_exact()
        self.encoder, self.dtype_report = choose_dtype(encoder, dtype)
        # Gradients are taken in float32, whatever is served: a probe's number must not be the dtype's.
        self.attacked = self.encoder if self.encoder.dtype == torch.float32 else encoder.served(torch.float32)
        # Served weights do not change; the encoder's own property would look at every tensor at each request.
        self.digest = self.encoder.digest
        self.max_batch = max_batch
        self.defence = defence or make_defence()
        self._observe = observe
        forwards, self.forward_report = choose_forward(self.encoder, forward, sizes=batch_sizes(max_batch))
        self.tower = ImageTower(
            self.encoder,
            max_batch,
            forwards=forwards,
            upcoming=lambda: self.images.upcoming(),
            on_padding=telemetry.BATCH_PAD_RATIO.observe,
        )
        self.images: Batcher[ImageJob, Tensor] = Batcher(
            f"{name} image",
            self.tower.run,
            max_batch=max_batch,
            max_queue=max_queue,
            max_wait=max_wait,
            idle_wait_ms=idle_wait_ms,
            more_expected=images_expected,
            shares_cores=self.encoder.device.type == "cpu",
            on_batch=self._observer("image"),
            cost=lambda job: job.defence.cost,
            gaps=self,
            out_of_memory=is_out_of_memory,
            free_memory=free_cached_memory,
            supervised=supervised,
        )
        self.prober: Prober | None = None
        self.probe_report: dict[str, float] = {}
        self._places, self._quantum = places, quantum_ms / 1000
        self.texts: Batcher[Tensor, Tensor] = Batcher(
            f"{name} text",
            self._run_texts,
            max_batch=max_batch,
            max_queue=max_queue,
            max_wait=max_wait,
            # Texts take no decoding, so none is on its way while the worker idles.
            idle_wait_ms=0,
            on_batch=self._observer("text"),
            out_of_memory=is_out_of_memory,
            free_memory=free_cached_memory,
            supervised=supervised,
        )
        for tower, batcher in (("image", self.images), ("text", self.texts)):
            batcher.on_expired = telemetry.EXPIRED.labels(tower).inc
        self.tokens = Tokenizing(name, self.encoder, max_queue=_TOKENS_AHEAD * max_queue)
        self.banks = Banks(name, self.encoder, self.encode_texts, part=max_batch, max_ahead=_PROMPTS_AHEAD * max_queue)

    @property
    def dtype(self) -> str:
        """Name of the dtype that the towers compute in."""
        return self.dtype_report.chosen

    @property
    def reference(self) -> str:
        """`name@digest`: this version, whatever the name stands for by then."""
        return f"{self.name}@{self.digest}"

    @property
    def identity(self) -> tuple[str, str, str]:
        """What decides a picture's features beside the picture and the defence: digest, dtype, preprocessing."""
        return self.digest, self.dtype, self.encoder.preprocessing.digest

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits, a probe or a text bank among it."""
        towers = any(tower.queued or tower.busy for tower in (self.images, self.texts))
        return towers or bool(self.tokens.queued or self.banks.queued) or self.pending

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
        """Warm both towers up, and start the workers; blocks until done."""
        (text,) = self.encoder.tokenize(["warm"])
        on_cpu = self.encoder.device.type == "cpu"
        warm(self.images.pace, self.max_batch, lambda size: self.tower.run(self._blanks(size)), on_cpu=on_cpu)
        most = min(self.max_batch, _WARM_TEXTS)
        warm(self.texts.pace, most, lambda size: self._run_texts([text] * size), on_cpu=on_cpu)
        if self._places is not None:
            self._prepare_probes(self._places)
        if self.tower.forwards is not None:
            self.tower.forwards.release()  # to the worker's thread
        self.images.start()
        self.texts.start()

    def _blanks(self, count: int) -> list[ImageJob]:
        side = self.encoder.resolution
        return [ImageJob(blank, _PLAIN) for blank in torch.zeros(count, 3, side, side, dtype=torch.uint8)]

    def _prepare_probes(self, places: Places) -> None:
        """Find how much of a probe fits into the quantum, which is fixed from here on."""
        quantum = self._quantum or 1.5 * self.images.pace.seconds(self.max_batch)
        # What is served is as fast as what is attacked, or faster.
        rows, seconds = measured_rows(self.attacked, quantum, self.images.pace.seconds)
        self.prober = Prober(rows, places=places, wake=self.images.nudge, describe=problem)
        self.probe_report = {
            "quantum_ms": round(1000 * quantum, 2),
            "rows": rows.gradient,
            "views": rows.views,
            "piece_ms": round(1000 * seconds, 2),
        }

    async def stop(self, drain: bool = True) -> None:
        """Stop the workers; with `drain`, after what waits has been run. Probes end with what they know."""
        self.tokens.stop()
        if self.prober is not None:
            self.prober.stop()
            while self.prober.pending and self.images.alive and not self.images.stuck:
                await asyncio.sleep(0.01)
            self.prober.close()
        await asyncio.gather(self.images.stop(drain), self.texts.stop(drain))

    def release(self) -> None:
        """Let go of the weights, once it has been stopped; afterwards it is of no use.

        Queues, workers and encoder hold each other: without this they would stay until the collector finds them.
        """
        for name in ("images", "tower", "texts", "tokens", "banks", "prober", "encoder", "attacked"):
            self.__dict__.pop(name, None)

    def room_for(self, pictures: int, defence: Defence) -> AbstractContextManager[Room]:
        """Let a request of so many pictures in before they are decoded.

        Raises:
            Overloaded, NotReady: as `Batcher.submit`.
        """
        return self.images.reserve(pictures * defence.cost)

    async def encode_images(
        self, pixels: Sequence[Tensor], defence: Defence, room: Room | None = None
    ) -> list[Tensor | Exception]:
        """Features of each picture's views.

        Args:
            pixels: uint8 [3, R, R] each, or float32 in [0, 1].
            defence: makes the views.
            room: that was made for them.

        Returns:
            For each picture float32 [views, dim] on the CPU, not normalised, or what went wrong with it.

        Raises:
            Overloaded, NotReady: as `Batcher.submit`.
        """
        return await self.images.submit_many([ImageJob(picture, defence) for picture in pixels], room)

    async def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> list[Tensor | Exception]:
        """Features of each text: float32 [dim] on the CPU, not normalised, or LabelError for one that is too long.

        Raises:
            Overloaded, NotReady: as `Batcher.submit`.
        """
        tokens = await self.tokens.rows(texts, truncate=truncate)
        readable = [row for row in tokens if isinstance(row, Tensor)]
        features = iter(await self.texts.submit_many(readable))
        return [next(features) if isinstance(row, Tensor) else row for row in tokens]

    async def text_bank(self, label_set: LabelSet, *, descriptions: bool = False, tenant: str = "") -> TextBank:
        """Encode a label set; callers see to it that each set is asked for once.

        Raises:
            LabelError: a text is too long.
            Overloaded, NotReady: as `Batcher.submit`.
        """
        return await self.banks.build(label_set, descriptions=descriptions, tenant=tenant)

    def watched(self, vital: Callable[[], bool], ailed: Callable[[str], None]) -> list[Watched]:
        """Both workers, for a supervisor; `vital` and `ailed` are those of Watched."""
        side = self.encoder.resolution
        blank = torch.zeros(3, side, side, dtype=torch.uint8)
        tokens = self.encoder.tokenize(["check"])[0]
        prober = self.prober

        async def see() -> Tensor:
            return await self.images.submit(ImageJob(blank, _PLAIN))

        async def read() -> Tensor:
            return await self.texts.submit(tokens)

        abandon = prober.abandon if prober is not None else lambda: None
        return [
            Watched(self.images, self.name, "image", see, abandon, owner=self, vital=vital, ailed=ailed),
            Watched(self.texts, self.name, "text", read, owner=self, vital=vital, ailed=ailed),
        ]

    def _run_texts(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            rows = self.encoder.encode_tokens(torch.stack(list(tokens))).cpu()
        return [row.clone() for row in rows]

    def _observer(self, tower: str) -> Callable[[int, float, float], None] | None:
        observe = self._observe
        if observe is None:
            return None
        return lambda items, seconds, waited: observe(tower, items, seconds, waited)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of torch, or of Python, says that there is not enough memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # As torch's allocators for the CPU say it, on Linux and elsewhere, CUDA's own calls, and its libraries.
    texts = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def free_cached_memory() -> None:
    """Give back what torch keeps of a GPU's memory for tensors to come."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def use_threads(threads: int) -> int:
    """Set how many CPU threads one forward pass uses; returns how many it now uses.

    0 leaves it to torch, which does not see a container's CPU quota: never more than that grants.

    Also lets threads take the interpreter from each other sooner: a forward pass asks for it a few hundred times,
    and by default waits up to 5 ms each time while the event loop or a decoder is busy.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))
    return torch.get_num_threads()

"""Batches of pictures through a defence and the image tower: what the image worker runs.

On a GPU it has three stages. The pixels of what waits are copied in a stream of their own while a batch runs
(`service.staging`); the tower runs, as a CUDA graph where there is one (`service.forwards`); the features come back
into pinned memory, and the thread sleeps until they are there. On a CPU the same code runs with neither graph nor
staging: the cores that would copy ahead are those that compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironclip.defences import Defence
from ironclip.encoder import Encoder
from ironclip.preprocessing import to_float
from service.forwards import FixedForwards
from service.staging import Staging


@dataclass(frozen=True)
class ImageJob:
    """One picture for the image tower: uint8 [3, R, R] or float32 in [0, 1], and the defence that makes its views."""

    pixels: Tensor
    defence: Defence

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of one group go through the defence together."""
        kind = self.pixels.is_floating_point()
        return (kind, self.defence.name, *sorted((key, repr(value)) for key, value in self.defence.options().items()))


class ImageTower:
    """The image tower of a served encoder, for its worker's thread.

    Args:
        encoder: as it is served.
        most: pictures in a batch at most.
        forwards: for batches of fixed sizes; None for the plain forward alone.
        upcoming: tells what is likely to be asked for next; asked while a batch runs.
        on_padding: told for each forward which share of it was filled up.
        ahead: copy what is upcoming; by default where the device is a GPU.
    """

    def __init__(
        self,
        encoder: Encoder,
        most: int,
        *,
        forwards: FixedForwards | None = None,
        upcoming: Callable[[], Sequence[ImageJob]] = lambda: (),
        on_padding: Callable[[float], None] = lambda share: None,
        ahead: bool | None = None,
    ) -> None:
        self.encoder = encoder
        self.forwards = forwards
        self._upcoming, self._on_padding = upcoming, on_padding
        self._on_gpu = encoder.device.type == "cuda"
        self._ahead = self._on_gpu if ahead is None else ahead
        self._most = most
        self.staging: Staging | None = None
        self._thread: threading.Thread | None = None

    def _begin(self) -> None:
        """Fresh staging for a thread that takes over: one that hangs may wake up and write into the old one."""
        self._thread = threading.current_thread()
        if self._on_gpu:
            torch.cuda.set_device(self.encoder.device)  # of this thread: pinned memory belongs to a device's context
        if self._ahead:
            side = self.encoder.resolution
            self.staging = Staging(self.encoder.device, self._most, (3, side, side))

    def run(self, jobs: Sequence[ImageJob]) -> list[Tensor]:
        """Features of each job's views, float32 [views, dim] on the CPU, each a tensor of its own."""
        if self._thread is not threading.current_thread():
            self._begin()
        staging = self.staging
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault(job.group, []).append(index)
        staged = [job.pixels for job in jobs if not job.pixels.is_floating_point()]
        on_device = staging.take(staged) if staging is not None and staged else None
        places = {id(picture): place for place, picture in enumerate(staged)}
        answers: list[tuple[list[int], Tensor]] = []
        for members in groups.values():
            pictures = [jobs[i].pixels for i in members]
            if on_device is None or pictures[0].is_floating_point():
                batch = self._moved(torch.stack(pictures))
            elif len(pictures) == len(staged):
                batch = on_device
            else:
                batch = on_device[[places[id(picture)] for picture in pictures]]
            answers.append((members, self._encode(batch, jobs[members[0]].defence)))
        if staging is not None:
            staging.prepare([job.pixels for job in self._upcoming()])
        if self._on_gpu:
            # Sleeps, and leaves the interpreter to others, until the last copy is there.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.encoder.device))
            done.synchronize()
        # Cloned, so that a row that is kept does not keep its whole batch.
        found = {i: row.clone() for members, rows in answers for i, row in zip(members, rows, strict=True)}
        return [found[i] for i in range(len(jobs))]

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of views, float [n, 3, R, R] -> [n, dim], both on the device; by a fixed forward if there is one."""
        forwards = self.forwards
        size = forwards.size_for(len(pixels)) if forwards is not None else None
        if forwards is None or size is None or not forwards.usable():
            self._on_padding(0.0)
            return self.encoder.encode_image(pixels)
        self._on_padding(1 - len(pixels) / size)
        return forwards(pixels, size)

    def _encode(self, batch: Tensor, defence: Defence) -> Tensor:
        """Features of a group's views [n, views, dim], on their way to the CPU."""
        # Inference mode is the faster one, but inside it a defence could not take gradients.
        with torch.no_grad() if defence.optimising else torch.inference_mode():
            floats = batch if batch.is_floating_point() else to_float(batch)
            views = defence.make_views(floats, self.encoder.encode_image)
            features = self.forward(views.flatten(0, 1))
            if len(features) != views.shape[0] * views.shape[1]:  # a reshape would give pictures each other's
                raise RuntimeError(f"the tower gave {len(features)} features for {views.shape[:2].numel()} views")
            features = features.reshape(*views.shape[:2], -1)
            # Into pinned memory, which torch provides for a copy that is not waited for.
            return features.to("cpu", non_blocking=True)

    def _moved(self, batch: Tensor) -> Tensor:
        if not self._on_gpu:
            return batch.to(self.encoder.device)
        return batch.pin_memory().to(self.encoder.device, non_blocking=True)

"""Pictures on their way to a GPU: pinned memory, and a stream of its own for the copies.

Two slots take turns. While a batch is computed from one, what waits behind it is copied into the other, so that the
next batch finds its pictures on the device. What is copied ahead is a guess and promises nothing: the batch is still
cut when the worker is free, so no deadline, no class and nobody who went away is decided too early; a picture that is
not there is copied then, and one that is not asked for is forgotten. So copying ahead never makes anyone wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Slot:
    """Room for one batch: on the host (pinned where the device is a GPU) and on the device."""

    def __init__(self, most: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = torch.empty(most, *shape, dtype=torch.uint8, device=device)
        self.host = torch.empty(most, *shape, dtype=torch.uint8, pin_memory=True) if self.on_gpu else self.device
        # The pictures that are in it, held so that no other tensor gets the identity of one of them.
        self.held: list[Tensor] = []
        self.rows: dict[int, int] = {}
        self.copied = torch.cuda.Event() if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.used = torch.cuda.Event() if self.on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def room(self) -> int:
        """Pictures that still fit."""
        return len(self.host) - len(self.held)

    def clear(self) -> None:
        """Forget what is in it."""
        self.held, self.rows = [], {}

    def add(self, pictures: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
        """Copy pictures behind those that are there; on a GPU in that stream, without waiting."""
        if not pictures:
            return
        start, end = len(self.held), len(self.held) + len(pictures)
        if self.copied is not None:
            self.copied.synchronize()  # the host side may still be read by the last copy
        torch.stack(list(pictures), out=self.host[start:end])
        self.rows.update({id(picture): row for row, picture in enumerate(pictures, start)})
        self.held += pictures
        if stream is None or self.copied is None or self.used is None:
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self.used)  # the batch that was computed from it may not be through
            self.device[start:end].copy_(self.host[start:end], non_blocking=True)
            self.copied.record(stream)


class Staging:
    """Copies pictures to a device, ahead of their batch where they are known ahead. For one thread.

    Args:
        device: where the model is.
        most: pictures in one batch at most.
        shape: of one picture, uint8.
    """

    def __init__(self, device: torch.device, most: int, shape: tuple[int, ...]) -> None:
        self.shape, self.most = shape, most
        self._on = device
        if device.type == "cuda":
            with torch.cuda.device(device):  # pinned memory belongs to the current device's context
                self._ahead, self._running = _Slot(most, shape, device), _Slot(most, shape, device)
            self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The slots' memory may have been another tensor's a moment ago, of work that still runs.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        else:
            self._ahead, self._running = _Slot(most, shape, device), _Slot(most, shape, device)
            self._stream = None
        self.hits = self.misses = 0  # pictures that were there already, and those that were not

    def prepare(self, pictures: Sequence[Tensor]) -> None:
        """Copy what is likely to be asked for next, beside a batch that runs; what does not fit is left out."""
        slot = self._ahead
        wanted = {id(picture): picture for picture in pictures if self._fits(picture)}
        if not any(identity in slot.rows for identity in wanted):
            slot.clear()
        fresh = [picture for identity, picture in wanted.items() if identity not in slot.rows]
        slot.add(fresh[: slot.room], self._stream)

    def take(self, pictures: Sequence[Tensor]) -> Tensor:
        """The pictures on the device, uint8 [n, ...], to be used until the next call.

        Raises:
            ValueError: one has another shape.
        """
        for picture in pictures:
            if not self._fits(picture):
                raise ValueError(f"pixels must be uint8 {list(self.shape)}, got {picture.dtype} {list(picture.shape)}")
        wanted = {id(picture): picture for picture in pictures}
        if len(wanted) > self.most:
            raise ValueError(f"{len(wanted)} pictures in one batch, at most {self.most} were provided for")
        self._swap()
        slot = self._running
        missing = [picture for identity, picture in wanted.items() if identity not in slot.rows]
        if len(missing) > slot.room:
            slot.clear()
            missing = list(wanted.values())
        self.hits, self.misses = self.hits + len(wanted) - len(missing), self.misses + len(missing)
        slot.add(missing, self._stream)
        if slot.copied is not None:
            torch.cuda.current_stream(self._on).wait_event(slot.copied)
        rows = [slot.rows[id(picture)] for picture in pictures]
        return slot.device[: len(rows)] if rows == list(range(len(rows))) else slot.device[rows]

    def _fits(self, picture: Tensor) -> bool:
        return picture.shape == self.shape and picture.dtype == torch.uint8

    def _swap(self) -> None:
        """What was copied ahead is run now; the other slot is free once what has been launched is through."""
        if self._running.used is not None:
            self._running.used.record(torch.cuda.current_stream(self._on))
        self._ahead, self._running = self._running, self._ahead
        self._ahead.clear()

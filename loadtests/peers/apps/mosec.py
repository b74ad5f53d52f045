"""mosec: `python -m loadtests.peers.apps.mosec --address 127.0.0.1 --port PORT`; decoding has processes of its own."""

from __future__ import annotations

import os

import mosec
import numpy as np
import torch
from numpy.typing import NDArray

from loadtests.peers.apps.tower import MAX_BATCH, MAX_WAIT_MS, Tower, Transform

_CHANNELS = 3


class Plain(mosec.Worker):  # type: ignore[misc]
    """Bytes between client and stages, and float32 pixels between stages, without pickle."""

    def deserialize(self, data: bytes) -> bytes:
        """The body is the picture."""
        return data

    def serialize(self, data: str) -> bytes:
        """The answer is the vector, base64."""
        return data.encode()

    def serialize_ipc(self, data: NDArray[np.float32]) -> bytes:
        """Pixels [3, R, R] as bytes."""
        return data.tobytes()

    def deserialize_ipc(self, data: bytes) -> NDArray[np.float32]:
        """Pixels [3, R, R] from bytes."""
        flat = np.frombuffer(data, np.float32)
        side = round((flat.size / _CHANNELS) ** 0.5)
        return flat.reshape(_CHANNELS, side, side)


class Decode(Plain):
    """Decodes one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = Transform()

    def forward(self, data: bytes) -> NDArray[np.float32]:
        """Pixels of one picture."""
        try:
            pixels: NDArray[np.float32] = self.transform.decode(data).numpy()
        except OSError as error:
            raise mosec.ValidationError("the picture cannot be decoded") from error
        return pixels


class Encode(Plain):
    """Encodes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, data: list[NDArray[np.float32]]) -> list[str]:
        """Vectors of a batch."""
        return self.tower.encode([torch.from_numpy(one.copy()) for one in data])


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(Decode, num=int(os.environ["OMP_NUM_THREADS"]))
    server.append_worker(Encode, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS, timeout=60)
    server.run()

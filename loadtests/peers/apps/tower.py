"""The model behind every framework that leaves the model to us: open_clip's tower and its own picture transform."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence

import open_clip
import torch
from PIL import Image
from torch import Tensor

# Items in one batch at most, and how long one waits for more: the same for every framework that has them.
MAX_BATCH = 32
MAX_WAIT_MS = 5


class Transform:
    """open_clip's own preparation of a picture for `PEER_MODEL`."""

    def __init__(self) -> None:
        config = open_clip.get_model_config(os.environ["PEER_MODEL"])
        side = config["vision_cfg"].get("image_size", 224)
        self.side: tuple[int, int] = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
        self.transform = open_clip.image_transform(self.side, is_train=False)

    def decode(self, picture: bytes) -> Tensor:
        """One file as float32 pixels [3, R, R], normalised."""
        pixels: Tensor = self.transform(Image.open(io.BytesIO(picture)))
        return pixels


class Tower(Transform):
    """The image tower of `PEER_MODEL` in `PEER_DTYPE`, with the weights that `random:MODEL` has."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.manual_seed(0)
        self.dtype = torch.bfloat16 if os.environ["PEER_DTYPE"] == "bfloat16" else torch.float32
        self.model = open_clip.create_model(os.environ["PEER_MODEL"]).eval().to(self.dtype)
        for size in (1, MAX_BATCH):  # as warm as the others are when they say that they are ready
            self.encode([torch.zeros(3, *self.side)] * size)

    def encode(self, pixels: Sequence[Tensor]) -> list[str]:
        """Vectors of length 1, each as base64 of little-endian float32."""
        with torch.inference_mode():
            features = self.model.encode_image(torch.stack(list(pixels)).to(self.dtype)).float()
            vectors = torch.nn.functional.normalize(features, dim=-1).numpy()
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]

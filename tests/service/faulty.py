"""`python -m service` with a model that has faults: which one, the picture says by its colour.

Everything but the fault is the real thing: the process, its threads, its sockets. A picture is a plain colour, so that
it means the same after decoding and resizing.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import torch
from PIL import Image

# Fault by the red of the picture; green and blue are free.
DIES, HANGS, NO_MEMORY, RAISES, BROKEN_FOR_GOOD, NEVER_MEMORY = 250, 240, 230, 220, 210, 200


def picture(red: int, green: int = 0, blue: int = 0) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (red, green, blue)).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> int:
    """Serve, with faults."""
    from ironclip.encoder import Encoder
    from service.__main__ import main as serve

    real: Any = Encoder.encode_image
    broken = False

    def encode_image(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal broken
        reds = {round(255 * red) for red in pixels[:, 0].amin(dim=(1, 2)).tolist()}
        if DIES in reds:
            raise SystemExit("the worker's thread ends")
        if HANGS in reds:
            time.sleep(3600)
        if NEVER_MEMORY in reds or (NO_MEMORY in reds and len(pixels) > 1):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if RAISES in reds:
            raise ValueError("the model does not like this picture")
        broken = broken or BROKEN_FOR_GOOD in reds
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        features: torch.Tensor = real(self, pixels)
        return features

    Encoder.encode_image = encode_image  # type: ignore[method-assign]
    return serve()


if __name__ == "__main__":
    sys.exit(main())

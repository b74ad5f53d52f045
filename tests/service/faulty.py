"""`python -m service` with a model that has faults: which one, the picture says by its colour.

Everything but the fault is the real thing: the process, its threads, its sockets. A picture is a plain colour, so that
it means the same after decoding and resizing.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

# Fault by the red of the picture; green and blue are free.
DIES, HANGS, NO_MEMORY, RAISES, BROKEN_FOR_GOOD, NEVER_MEMORY = 250, 240, 230, 220, 210, 200
# The model is at it until `let_go`; the thread that decodes it is at it for ever.
WAITS, STICKS = 190, 180
_GATE = "gate"  # beside the service's state


def picture(red: int, green: int = 0, blue: int = 0) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (red, green, blue)).save(buffer, "PNG")
    return buffer.getvalue()


def let_go(folder: Path) -> None:
    """Have the model go on with the pictures that wait, in services that were started in the folder."""
    (folder / _GATE).touch()


def main() -> int:
    """Serve, with faults."""
    from ironclip.encoder import Encoder
    from service import decoder
    from service.__main__ import main as serve
    from service.images import DecodedImage

    real: Any = Encoder.encode_image
    decoding: Any = decoder
    real_decode = decoding.decode
    gate = Path(os.environ["IRONCLIP_STATE_DIR"]).parent / _GATE
    broken = False

    def decode(*arguments: Any) -> DecodedImage:
        decoded: DecodedImage = real_decode(*arguments)
        if int(decoded.pixels[0].min()) == STICKS:
            time.sleep(3600)
        return decoded

    def encode_image(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal broken
        reds = {round(255 * red) for red in pixels[:, 0].amin(dim=(1, 2)).tolist()}
        if DIES in reds:
            raise SystemExit("the worker's thread ends")
        if HANGS in reds:
            time.sleep(3600)
        while WAITS in reds and not gate.exists():
            time.sleep(0.01)
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
    decoding.decode = decode
    return serve()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # as the service does: threads that are stuck are not waited for

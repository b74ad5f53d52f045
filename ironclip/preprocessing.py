"""From a decoded picture to the encoder's pixels: one rule set for training, service and cache keys.

A `Preprocessing` is a value with a digest. For RGB input its pixels equal open_clip's own evaluation
transform before normalisation, bit for bit; beyond that it settles what open_clip leaves to chance, so that
the model sees the picture that a person sees:

* the EXIF orientation is applied (EXIF only, as browsers do: not XMP, not PNG text);
* transparency (alpha channel, tRNS, palette) is composited on `background` at full size, before any
  resampling, so colours hidden under alpha 0 never reach the model;
* 16-bit samples keep their high byte (v // 256), gray, palette and CMYK become RGB;
* colour profiles (ICC, gAMA) are not applied: CLIP's training never did, and a hostile profile is then
  powerless over the model; the answer carries a warning because a viewer may show other colours.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ironclip.errors import ImageInvalid, ImageUnsupported, OptionError

WARNINGS: dict[str, str] = {
    "exif-rotated": "the EXIF orientation was applied",
    "exif-invalid": "the EXIF orientation is not a number from 1 to 8 and was ignored",
    "alpha-composited": "transparent parts were composited on the background colour",
    "16-bit-scaled": "16-bit samples were scaled to 8 bits",
    "cmyk-converted": "CMYK was converted to RGB without a colour profile",
    "icc-ignored": "the embedded colour profile was not applied",
    "gamma-ignored": "the PNG gamma differs from sRGB's and was not applied",
    "upscaled": "the picture is smaller than the encoder's input and was enlarged",
    "mostly-cropped": "less than half of the picture lies inside the encoder's square crop",
    "multi-picture": "the file holds further pictures; only the first was used",
    "trailing-bytes-ignored": "bytes after the end of the picture were ignored",
}
"""Every warning code that preprocessing (here or in the service) can give, with its meaning."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Beyond this aspect ratio the resized strip would be huge (16384 x 1 at 224 is 822 megapixels), so only the
# part under the crop is resampled; the result may then differ from open_clip's by rounding.
_EXACT_ASPECT = 64
_SRGB_GAMMA = 0.45455
_TAG_ORIENTATION, _TYPE_SHORT, _MAX_IFD_ENTRIES = 0x0112, 3, 1024


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the encoder's uint8 pixels; frozen, comparable, and identified by `digest`.

    Args:
        resolution: side R of the encoder's square input, pixels.
        interpolation: 'bicubic' or 'bilinear' (antialiased, Pillow's).
        resize_mode: 'shortest' (resize the short side to R, crop the centre), 'longest' (resize the long
            side to R, pad with `fill_color`) or 'squash' (resize to R x R).
        fill_color: gray level 0..255 of the padding.
        background: RGB under transparent parts; white is what most viewers show.
        version: number of this rule set; raised whenever the same file would give other pixels.

    Raises:
        OptionError: a value is out of its range.
    """

    resolution: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    background: tuple[int, int, int] = (255, 255, 255)
    version: int = 1

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise OptionError(f"preprocessing: resolution must be at least 1, not {self.resolution}")
        if self.interpolation not in _RESAMPLING:
            raise OptionError(f"preprocessing: interpolation must be one of {sorted(_RESAMPLING)}")
        if self.resize_mode not in _RESIZE_MODES:
            raise OptionError(f"preprocessing: resize_mode must be one of {list(_RESIZE_MODES)}")
        if not all(0 <= value <= 255 for value in (self.fill_color, *self.background)):
            raise OptionError("preprocessing: colours must lie in 0..255")

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """Read open_clip's `preprocess_cfg`: size, interpolation, resize_mode, fill_color (not mean and std).

        Raises:
            OptionError: the input is not square, or a value is not known.
        """
        size = cfg.get("size", 224)
        sides = {int(size)} if isinstance(size, int) else {int(side) for side in size}  # JSON gives [224, 224]
        if len(sides) != 1:
            raise OptionError(f"preprocessing: only square inputs are served, not {size}")
        interpolation = cfg.get("interpolation") or "bicubic"
        return cls(
            resolution=sides.pop(),
            interpolation="bicubic" if interpolation == "random" else interpolation,  # as open_clip evaluates it
            resize_mode=cfg.get("resize_mode") or "shortest",
            fill_color=int(cfg.get("fill_color") or 0),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Return the encoder's pixels, uint8 [3, R, R], and the codes of `WARNINGS` that apply.

        Raises:
            ImageInvalid: the picture is empty.
            ImageUnsupported: a pixel mode that has no defined way to RGB.
        """
        if min(image.size) < 1:
            raise ImageInvalid("the picture has no pixels")
        warnings: list[str] = []
        image.load()  # some headers (PNG eXIf) may follow the pixels
        _note_profiles(image, warnings)
        upright = _apply_orientation(image, warnings)
        opaque = _flatten(upright, self.background, warnings)
        if min(opaque.size) < self.resolution:
            warnings.append("upscaled")
        width, height = opaque.size
        if self.resize_mode == "shortest" and max(width, height) > 2 * min(width, height):
            warnings.append("mostly-cropped")
        square = self._fit(opaque)
        # Transposed by numpy: torch would spread the copy over all cores, which decoding threads do not have.
        pixels = np.array(np.asarray(square).transpose(2, 0, 1), dtype=np.uint8, order="C")
        return torch.from_numpy(pixels), tuple(warnings)

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop or pad to RGB R x R."""
        side, method = self.resolution, _RESAMPLING[self.interpolation]
        width, height = image.size
        if self.resize_mode == "squash":
            return _to_rgb(_resize(image, (side, side), method))
        if self.resize_mode == "longest":
            ratio = max(width / side, height / side)
            resized = _resize(image, (max(1, round(width / ratio)), max(1, round(height / ratio))), method)
            canvas = Image.new("RGB", (side, side), (self.fill_color,) * 3)
            canvas.paste(_to_rgb(resized), ((side - resized.width) // 2, (side - resized.height) // 2))
            return canvas
        short, long = min(width, height), max(width, height)
        stretched = int(side * long / short)
        new_width, new_height = (side, stretched) if width <= height else (stretched, side)
        left, top = round((new_width - side) / 2.0), round((new_height - side) / 2.0)
        if long > _EXACT_ASPECT * short:
            across, down = width / new_width, height / new_height
            box = (left * across, top * down, (left + side) * across, (top + side) * down)
            return _to_rgb(image.resize((side, side), method, box=box))
        resized = _resize(image, (new_width, new_height), method)
        return _to_rgb(resized.crop((left, top, left + side, top + side)))


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels of any shape into float32 in [0, 1], the form every Encoder takes."""
    return pixels.to(torch.float32).div(255)


def load_image(path: str | Path) -> Image.Image:
    """Open a picture file that you trust, decoded in full (the service has its own, wary, reader).

    Raises:
        ImageInvalid: not a readable picture.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise ImageInvalid(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageInvalid(f"{path} is not a readable picture: {error}") from error
    return image


def exif_orientation(exif: bytes) -> int | None:
    """Read the orientation from a raw EXIF block; None where there is none, 0 where it is malformed.

    Only the first directory is looked at, over a bounded number of entries, so a hostile block (circular
    directories, absurd counts and offsets) costs nothing and cannot raise.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    for entry in range(min(count, _MAX_IFD_ENTRIES)):
        offset = start + 2 + 12 * entry
        if offset + 12 > len(exif):
            return None
        tag, kind, number = struct.unpack_from(order + "HHI", exif, offset)
        if tag == _TAG_ORIENTATION:
            (value,) = struct.unpack_from(order + "H", exif, offset + 8)
            return int(value) if kind == _TYPE_SHORT and number == 1 and value <= 8 else 0
    return None


def _note_profiles(image: Image.Image, warnings: list[str]) -> None:
    if image.info.get("icc_profile"):
        warnings.append("icc-ignored")
    gamma = image.info.get("gamma")
    if isinstance(gamma, float) and abs(gamma - _SRGB_GAMMA) > 0.01:
        warnings.append("gamma-ignored")


def _apply_orientation(image: Image.Image, warnings: list[str]) -> Image.Image:
    exif = image.info.get("exif")
    orientation = exif_orientation(exif) if isinstance(exif, bytes) else None
    if orientation == 0:
        warnings.append("exif-invalid")
    method = _TRANSPOSE.get(orientation or 1)
    if method is None:
        return image
    warnings.append("exif-rotated")
    turned = image.transpose(method)
    turned.info = image.info  # the transparency colour lies there
    return turned


def _flatten(image: Image.Image, background: tuple[int, int, int], warnings: list[str]) -> Image.Image:
    """Return the picture without transparency, as RGB, L or CMYK (which resample channel by channel)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        warnings.append("16-bit-scaled")
        image = _from_16_bit(image)
    if image.mode == "CMYK":
        warnings.append("cmyk-converted")
        return image
    has_alpha = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    if not has_alpha:
        if image.mode in ("RGB", "L"):
            return image
        return image.convert("L") if image.mode == "1" else _to_rgb(image)
    layered = _with_alpha(image)
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return layered.convert("RGB")
    warnings.append("alpha-composited")
    flat = Image.new("RGB", image.size, background)
    flat.paste(layered, mask=alpha)
    return flat


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return image  # converting would copy it, and large pictures are the reason for the limits
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow cuts 16-bit samples to 8 bits but leaves the transparent colour at 16.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    try:
        return image.convert("RGBA")
    except (ValueError, TypeError) as error:
        raise ImageUnsupported(f"pixels of mode {image.mode} with transparency cannot be converted: {error}") from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to L (or LA, where a gray level is declared transparent)."""
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        raise ImageUnsupported("gray values beyond 16 bits are not accepted")
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _resize(image: Image.Image, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except (ValueError, TypeError) as error:
        raise ImageUnsupported(f"pixels of mode {image.mode} cannot be converted to RGB: {error}") from error

"""Preprocessing shows the model what a person sees, and equals open_clip where open_clip is defined."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ironclip.errors import ImageInvalid, OptionError
from ironclip.preprocessing import WARNINGS, Preprocessing, exif_orientation, load_image, to_float


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def round_trip(image: Image.Image, form: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def exif_with(orientation: int, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, kind, count, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry + struct.pack(order + "I", 0)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    resolution=st.sampled_from([1, 17, 32, 224]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    fill=st.sampled_from([0, 127, 255]),
)
@settings(max_examples=150, deadline=None)
def test_pixels_equal_open_clips_own_transform(
    width: int, height: int, resolution: int, mode: str, interpolation: str, fill: int
) -> None:
    ratio = max(width, height) / min(width, height)
    if ratio > 64 or (mode == "longest" and min(width, height) * resolution / max(width, height) <= 0.5):
        return  # open_clip cannot make a picture of no height
    image = Image.fromarray(noise(width, height))
    theirs = open_clip.transform.image_transform(
        resolution,
        is_train=False,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        resize_mode=mode,
        interpolation=interpolation,
        fill_color=fill,
    )(image)
    ours, _ = Preprocessing(resolution, interpolation, mode, fill)(image)
    assert ours.dtype == torch.uint8
    assert torch.equal(to_float(ours), theirs)


def test_config_of_a_real_model_is_read_and_normalises_to_open_clips_input() -> None:
    cfg = {**open_clip.transform.PreprocessCfg().__dict__, "size": [224, 224]}
    preprocessing = Preprocessing.from_open_clip(cfg)
    image = Image.fromarray(noise(300, 260))
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(), is_train=False)(image)
    pixels = to_float(preprocessing(image)[0])
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal((pixels - mean) / std, theirs)


def test_gray_and_cmyk_resample_as_open_clip_does() -> None:
    transform = open_clip.transform.image_transform(32, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for image in (
        Image.fromarray(noise(90, 70, 1)),
        Image.fromarray(noise(90, 70, 4), "RGBA").convert("RGB").convert("CMYK"),
    ):
        ours, _ = Preprocessing(32)(image)
        assert torch.equal(to_float(ours), transform(image))


def test_one_pixel_and_extreme_strips_are_cheap() -> None:
    for size in ((1, 1), (1, 16384), (16384, 1), (3, 9000)):
        for mode in ("shortest", "longest", "squash"):
            began = time.perf_counter()
            pixels, warnings = Preprocessing(224, resize_mode=mode)(Image.new("RGB", size, (10, 20, 30)))
            assert pixels.shape == (3, 224, 224)
            assert "upscaled" in warnings
            assert time.perf_counter() - began < 1
            if mode != "longest":
                assert pixels[:, 100, 100].tolist() == [10, 20, 30]


def test_strip_beyond_the_exact_aspect_differs_by_rounding_only() -> None:
    image = Image.fromarray(noise(650, 10))
    exact = open_clip.transform.image_transform(32, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)(image)
    ours, warnings = Preprocessing(32)(image)
    assert (to_float(ours) - exact).abs().max() <= 1.01 / 255
    assert "mostly-cropped" in warnings


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_all_exif_orientations_give_the_upright_pixels(form: str) -> None:
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # Pillow's transpose ops that store each
    upright = Image.fromarray(noise(61, 40))
    expected, _ = Preprocessing(32)(upright)
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[form]
    for orientation in range(1, 9):
        stored = upright
        for operation in undo.get(orientation, []):
            stored = stored.transpose(Image.Transpose(operation))
        for order in "<>":
            opened = round_trip(stored, form, exif=exif_with(orientation, order=order), **options)
            pixels, warnings = Preprocessing(32)(opened)
            assert ("exif-rotated" in warnings) == (orientation > 1)
            error = (pixels.int() - expected.int()).abs().max()
            assert error == 0 if form != "JPEG" else error < 25


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_impossible_orientation_is_ignored_and_said(orientation: int) -> None:
    opened = round_trip(Image.fromarray(noise(50, 40)), "PNG", exif=exif_with(orientation))
    pixels, warnings = Preprocessing(32)(opened)
    assert warnings == ("exif-invalid",)
    assert torch.equal(pixels, Preprocessing(32)(Image.fromarray(noise(50, 40)))[0])


@given(st.binary(max_size=300), st.sampled_from([b"", b"II*\0", b"MM\0*", b"Exif\0\0II*\0\x08\0\0\0"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_as_exif_are_harmless(garbage: bytes, head: bytes) -> None:
    value = exif_orientation(head + garbage)
    assert value is None or 0 <= value <= 8


def test_colours_hidden_under_alpha_zero_do_not_matter() -> None:
    shown, hidden_a, hidden_b = noise(80, 60), noise(80, 60, seed=1), noise(80, 60, seed=2)
    alpha = np.zeros((60, 80, 1), np.uint8)
    alpha[20:40] = 255
    results = []
    for hidden in (hidden_a, hidden_b):
        rgba = np.concatenate([np.where(alpha > 0, shown, hidden), alpha], axis=2)
        pixels, warnings = Preprocessing(32)(round_trip(Image.fromarray(rgba), "PNG"))
        assert warnings == ("alpha-composited",)
        results.append(pixels)
    flat = Image.fromarray(np.where(alpha > 0, shown, 255).astype(np.uint8))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], Preprocessing(32)(flat)[0])


def test_background_is_a_choice_with_its_own_digest() -> None:
    clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    white, black = Preprocessing(16), Preprocessing(16, background=(0, 0, 0))
    assert white(clear)[0].min() == 255
    assert black(clear)[0].max() == 0
    assert white.digest != black.digest
    assert white.digest == Preprocessing(16).digest
    assert len(white.digest) == 64


def test_opaque_alpha_equals_no_alpha() -> None:
    rgb = Image.fromarray(noise(80, 60))
    rgba = rgb.copy()
    rgba.putalpha(255)
    pixels, warnings = Preprocessing(32)(rgba)
    assert torch.equal(pixels, Preprocessing(32)(rgb)[0])
    assert warnings == ()


def test_every_kind_of_png_transparency_is_composited() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    rgb = Image.new("RGB", (40, 40), red)
    rgb.paste(blue, (0, 0, 20, 40))
    gray = Image.new("L", (40, 40), 7)
    gray.paste(100, (0, 0, 20, 40))
    sixteen = Image.fromarray(np.where(np.arange(40) < 20, 100 * 257, 7).astype(np.uint16)[None].repeat(40, 0))
    palette = rgb.quantize(2)
    index = palette.getpixel((30, 5))
    cases: dict[str, tuple[Image.Image, dict[str, Any], tuple[int, ...]]] = {
        "RGB+tRNS": (rgb, {"transparency": red}, blue),
        "L+tRNS": (gray, {"transparency": 7}, (100,) * 3),
        "I;16+tRNS": (sixteen, {"transparency": 7}, (100,) * 3),
        "P+tRNS": (palette, {"transparency": index}, blue),
        "P+tRNS table": (palette, {"transparency": bytes(0 if i == index else 254 for i in range(2))}, blue),
        "LA": (Image.merge("LA", (gray, gray.point(lambda v: 255 if v == 100 else 0))), {}, (100,) * 3),
    }
    for name, (image, options, colour) in cases.items():
        pixels, warnings = Preprocessing(40)(round_trip(image, "PNG", **options))
        assert "alpha-composited" in warnings, name
        assert (pixels[:, :, 25:] >= 253).all(), name  # the transparent half is white
        assert (pixels[:, 5, 5].int() - torch.tensor(colour)).abs().max() <= 2, name


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    pixels, warnings = Preprocessing(64)(round_trip(Image.fromarray(ramp), "PNG"))
    assert warnings == ("16-bit-scaled",)
    assert torch.equal(pixels[0, 0], torch.from_numpy((ramp[0] >> 8).astype(np.uint8)))


def test_profiles_are_not_applied_but_reported() -> None:
    image = Image.fromarray(noise(40, 40))
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100000))
    tagged = round_trip(image, "PNG", icc_profile=b"x" * 200, pnginfo=info)
    pixels, warnings = Preprocessing(40)(tagged)
    assert set(warnings) == {"icc-ignored", "gamma-ignored"} <= set(WARNINGS)
    assert torch.equal(pixels, Preprocessing(40)(image)[0])


def test_bilevel_and_palette_are_not_resampled_by_nearest_neighbour() -> None:
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    gray, _ = Preprocessing(8)(checks)
    for mode in ("1", "P"):
        assert torch.equal(Preprocessing(8)(checks.convert(mode))[0], gray)


def test_unusable_settings_and_files_say_so(tmp_path: Path) -> None:
    for bad in (
        {"resolution": 0},
        {"resolution": 8, "interpolation": "x"},
        {"resolution": 8, "resize_mode": "x"},
    ):
        with pytest.raises(OptionError):
            Preprocessing(**bad)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="square"):
        Preprocessing.from_open_clip({"size": (224, 336)})
    (tmp_path / "x.png").write_bytes(b"not a picture")
    for name in ("x.png", "missing.png"):
        with pytest.raises(ImageInvalid):
            load_image(tmp_path / name)

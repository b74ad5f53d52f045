"""Hostile pictures get a clear error, in time and memory, and never disturb the next good one."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ironclip.errors import (
    ImageError,
    ImageInvalid,
    ImageTooLarge,
    ImageUnsupported,
    OptionError,
)
from ironclip.preprocessing import WARNINGS, Preprocessing
from service.containers import read_container
from service.images import ImageLimits, bytes_digest, decode, parse_data, pixels_digest

ROOT = Path(__file__).parents[2]
LIMITS = ImageLimits()
SMALL = Preprocessing(32)


@pytest.fixture(scope="module")
def good(corpus: ModuleType) -> bytes:
    data: bytes = corpus.encoded("PNG")
    return data


def test_every_refused_picture_gets_its_error_and_the_next_good_one_decodes(
    corpus: ModuleType, malformed_images: dict[str, bytes], good: bytes
) -> None:
    expected = SMALL(corpus.picture())[0]
    assert len(malformed_images) >= 40
    wrong = []
    for name, data in malformed_images.items():
        began = time.perf_counter()
        try:
            decode(data, SMALL, LIMITS)
            wrong.append(f"{name}: accepted")
        except ImageError as error:
            if error.code != name.partition("/")[0] or len(error.detail) < 20:
                wrong.append(f"{name}: {error.code}: {error}")
        if time.perf_counter() - began > 2:
            wrong.append(f"{name}: took {time.perf_counter() - began:.1f} s")
        assert torch.equal(decode(good, SMALL, LIMITS).pixels, expected)
    assert not wrong, "\n".join(wrong)


def test_odd_but_honest_pictures_decode(odd_images: dict[str, bytes]) -> None:
    for name, data in odd_images.items():
        began = time.perf_counter()
        decoded = decode(data, SMALL, LIMITS)
        assert decoded.pixels.shape == (3, 32, 32), name
        assert set(decoded.warnings) <= set(WARNINGS), name
        assert time.perf_counter() - began < 2, name


@pytest.mark.parametrize(
    ("name", "plain", "warning"),
    [
        ("jpeg-then-zip", "jpeg", "trailing-bytes-ignored"),
        ("png-then-html", "png", "trailing-bytes-ignored"),
        ("webp-then-html", "webp", "trailing-bytes-ignored"),
        ("jpeg-of-two-pictures", "jpeg", "multi-picture"),
        ("jpeg-exif-huge-counts", "jpeg", "exif-invalid"),
        ("jpeg-exif-circular-directories", "jpeg", None),
        ("jpeg-html-in-comment", "jpeg", None),
        ("png-3000-texts", "png", None),
    ],
)
def test_what_surrounds_the_pixels_does_not_change_them(
    corpus: ModuleType, odd_images: dict[str, bytes], name: str, plain: str, warning: str | None
) -> None:
    decoded = decode(odd_images[name], SMALL, LIMITS)
    assert torch.equal(decoded.pixels, decode(corpus.encoded(plain.upper()), SMALL, LIMITS).pixels)
    assert decoded.warnings == ((warning,) if warning else ())


def test_cmyk_ycck_and_sixteen_bits_show_the_same_picture(corpus: ModuleType, odd_images: dict[str, bytes]) -> None:
    plain = decode(corpus.encoded("PNG"), SMALL, LIMITS).pixels.int()
    cmyk = decode(odd_images["jpeg-cmyk"], SMALL, LIMITS)
    assert (cmyk.pixels.int() - plain).abs().float().mean() < 8
    assert cmyk.source_mode == "CMYK"
    gray = decode(corpus.encoded("PNG", corpus.picture(mode="L")), SMALL, LIMITS)
    deep = decode(odd_images["png-gray-16"], SMALL, LIMITS)
    assert torch.equal(gray.pixels, deep.pixels)
    assert deep.warnings == ("16-bit-scaled",)
    assert decode(odd_images["png-rgb-16"], SMALL, LIMITS).pixels[:, 0, 0].tolist() == [60_000 >> 8, 0, 255]


def test_whole_corpus_stays_within_300_megabytes(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(
        "import importlib.util, json, resource, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"spec = importlib.util.spec_from_file_location('malformed', {str(ROOT / 'tests/service/malformed.py')!r})\n"
        "malformed = importlib.util.module_from_spec(spec); spec.loader.exec_module(malformed)\n"
        "from ironclip.errors import ImageError\n"
        "from ironclip.preprocessing import Preprocessing\n"
        "from service.images import ImageLimits, decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "pictures = {**malformed.refused(), **malformed.odd()}\n"
        "before = peak()\n"
        "for data in pictures.values():\n"
        "    try: decode(data, Preprocessing(224), ImageLimits())\n"
        "    except ImageError: pass\n"
        "print(json.dumps(peak() - before))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) < 300


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_mutation_ends_in_pixels_or_an_image_error(corpus: ModuleType, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    options = data.draw(
        st.sampled_from([{}, {"progressive": True}, {"lossless": True}, {"exif": corpus.exif((0x112, 3, 1, 6))}])
    )
    mutated = bytearray(corpus.encoded(form, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if action == "flip":
            mutated[position] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del mutated[position : position + data.draw(st.integers(1, 40))]
        elif action == "insert":
            mutated[position:position] = data.draw(st.binary(max_size=20))
        else:
            mutated[position:position] = mutated[position : position + 60]
        if not mutated:
            break
    with contextlib.suppress(ImageError):
        assert decode(bytes(mutated), SMALL, LIMITS).pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_and_transparency_reach_the_pixels(corpus: ModuleType, form: str) -> None:
    options = {} if form == "PNG" else {"quality": 100} if form == "JPEG" else {"lossless": True}
    upright = decode(corpus.encoded(form, **options), SMALL, LIMITS)
    stored = corpus.picture().transpose(Image.Transpose.ROTATE_90)
    turned = decode(corpus.encoded(form, stored, exif=corpus.exif((0x112, 3, 1, 6)), **options), SMALL, LIMITS)
    assert turned.warnings == ("exif-rotated",)
    assert turned.source_size == (40, 48)
    assert (turned.pixels.int() - upright.pixels.int()).abs().max() <= (12 if form == "JPEG" else 0)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_reaches_the_decoder_without_what_is_not_pixels(corpus: ModuleType, mode: str, lossless: bool) -> None:
    image = corpus.picture(mode=mode)
    if mode == "RGBA":
        image.putalpha(corpus.picture(mode="L"))
    plain = corpus.encoded("WEBP", image, lossless=lossless)
    secret = b"nobody's business"
    full = corpus.encoded(
        "WEBP", image, lossless=lossless, exif=corpus.exif((0x112, 3, 1, 3)) + secret, xmp=secret, icc_profile=secret
    )
    full = corpus.webp(full[12:], corpus.webp_chunk(b"ABCD", secret))
    found = read_container(full, LIMITS)
    assert full.count(secret) == 4
    assert secret not in found.data
    for name in (b"EXIF", b"XMP ", b"ICCP", b"ABCD"):
        assert name not in found.data
    with Image.open(io.BytesIO(found.data)) as opened, Image.open(io.BytesIO(plain)) as wanted:
        assert opened.mode == wanted.mode
        assert opened.tobytes() == wanted.tobytes()
        assert not {"exif", "xmp", "icc_profile"} & set(opened.info)
    warnings = decode(full, SMALL, LIMITS).warnings
    assert {"exif-rotated", "icc-ignored"} <= set(warnings)
    assert read_container(plain, LIMITS).data == plain


def test_content_hidden_under_alpha_zero_is_not_seen(corpus: ModuleType) -> None:
    hidden = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    decoded = decode(corpus.encoded("PNG", Image.fromarray(hidden)), SMALL, LIMITS)
    assert decoded.pixels.min() == 255
    assert decoded.warnings == ("alpha-composited",)


def test_declared_type_must_agree(good: bytes) -> None:
    for fine in (None, "", "image/png", "IMAGE/PNG; charset=binary", "application/octet-stream", "image/*"):
        decode(good, SMALL, LIMITS, fine)
    for wrong in ("image/jpeg", "image/webp", "image/svg+xml", "text/html", "image/gif"):
        with pytest.raises(ImageUnsupported):
            decode(good, SMALL, LIMITS, wrong)


def test_limits_hold_at_the_edge(corpus: ModuleType, good: bytes) -> None:
    decode(good, SMALL, ImageLimits(max_bytes=len(good), max_pixels=48 * 40, max_side=48))
    for tight in (
        ImageLimits(max_bytes=len(good) - 1),
        ImageLimits(max_pixels=48 * 40 - 1),
        ImageLimits(max_side=47),
    ):
        with pytest.raises(ImageTooLarge) as caught:
            decode(good, SMALL, tight)
        assert caught.value.limit
    with pytest.raises(OptionError):
        ImageLimits(max_pixels=200_000_000)


def test_base64_and_data_uris(good: bytes) -> None:
    text = base64.b64encode(good).decode()
    assert parse_data(text, LIMITS) == (good, None)
    assert parse_data(f"data:image/png;base64,{text}", LIMITS) == (good, "image/png")
    assert parse_data(f"DATA:image/png;name=a.png;BASE64,{text}", LIMITS) == (good, "image/png")
    assert parse_data(f"data:;base64,{text}", LIMITS) == (good, None)
    assert parse_data(text, ImageLimits(max_bytes=len(good))) == (good, None)
    for bad in ("https://example.org/a.png", "file:///etc/passwd", "data:image/png,abc", "data:image/png;base64"):
        with pytest.raises(ImageUnsupported):
            parse_data(bad, LIMITS)
    for bad in (
        text[:-1],
        text[:40] + "\n" + text[40:],
        " " + text,
        "é" + text,
        "a-_b",
        "/etc/passwd",
        "\ud800abc",
        "====",
    ):
        with pytest.raises(ImageInvalid):
            parse_data(bad, LIMITS)


def test_base64_is_measured_before_it_is_decoded() -> None:
    limits = ImageLimits(max_bytes=1000)
    with pytest.raises(ImageTooLarge):
        parse_data("A" * 1340, limits)
    with pytest.raises(ImageTooLarge):
        parse_data("!" * 1_000_000, limits)  # not even base64: the size is what is said first


def test_digests_tell_content_apart() -> None:
    pixels = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    assert pixels_digest(pixels) == pixels_digest(pixels.clone())
    assert pixels_digest(pixels) != pixels_digest(pixels.reshape(3, 2, 8))
    assert pixels_digest(pixels) == pixels_digest(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert bytes_digest(b"a") != bytes_digest(b"b")

"""`figure`: test-vendor pictures and what the encoder says of them, drawn for the README."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ironclip.classifier import Classifier, predict
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from training.demo_files import draw_icon
from training.emoji.pictures import VendorImages, load_vendor, manifest_names, read_manifest
from training.evaluate import FLAGS, TEMPLATES

COLUMNS, ROWS, SIDE, SEED = 3, 3, 150, 0
TITLES = {
    "emojione": "EmojiOne 2 / EmojiTwo (CC BY 4.0)",
    "openmoji": "OpenMoji (openmoji.org), CC BY-SA 4.0, as is this whole picture",
}
RIGHT, WRONG, INK, BAR = "#1a7f37", "#b3261e", "#1f2328", "#c8d8f0"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _cell(
    canvas: Image.Image, left: int, top: int, picture: Image.Image, truth: str, guesses: list[tuple[str, float]]
) -> None:
    draw = ImageDraw.Draw(canvas)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    canvas.paste(white.convert("RGB"), (left + 30, top))
    for rank, (label, probability) in enumerate(guesses):
        line = top + SIDE + 8 + rank * 21
        draw.rectangle((left, line, left + int((SIDE + 56) * probability), line + 18), fill=BAR)
        colour = RIGHT if label == truth else (WRONG if rank == 0 else INK)
        shown = label if len(label) <= 24 else label[:23] + "…"
        draw.text((left + 3, line + 1), f"{shown} {100 * probability:.0f} %", fill=colour, font=_font(13))
    if truth not in [label for label, _ in guesses]:
        shown = truth if len(truth) <= 24 else truth[:23] + "…"
        draw.text((left + 3, top + SIDE + 73), f"truth: {shown}", fill=INK, font=_font(12))


def draw_predictions(spec: str, data: Path, out: Path, seed: int = SEED) -> None:
    """Draw a block of random pictures (no flags) of each test vendor, side by side, with the top three of all names.

    The pictures are a random sample (``seed``), not a selection; green is right, red is a wrong first answer.
    """
    encoder = load_encoder(spec)
    manifest = read_manifest(data)
    names = manifest_names(manifest)
    classifier = Classifier(encoder, LabelSet.parse([name.label for name in names], list(TEMPLATES)))
    generator = torch.Generator().manual_seed(seed)
    block, height = COLUMNS * (SIDE + 70) + 24, ROWS * (SIDE + 100) + 40
    canvas = Image.new("RGB", (block * len(TITLES), height), "white")
    draw = ImageDraw.Draw(canvas)
    keep = torch.tensor([name.group != FLAGS for name in names])
    for part, (vendor, title) in enumerate(TITLES.items()):
        source = load_vendor(data, manifest, vendor)[0]
        images = VendorImages(source, names, encoder.preprocessing)
        allowed = torch.nonzero(keep[images.labels]).flatten()
        chosen = allowed[torch.randperm(len(allowed), generator=generator)[: COLUMNS * ROWS]].tolist()
        scores = predict(classifier, images.images(chosen)).logits.softmax(-1).topk(3)
        draw.text((part * block + 12, 8), title, fill=INK, font=_font(16))
        for place, index in enumerate(chosen):
            guesses = [
                (names[label].label, share)
                for label, share in zip(scores.indices[place].tolist(), scores.values[place].tolist(), strict=True)
            ]
            picture = draw_icon(data, vendor, index, SIDE)
            row, column = divmod(place, COLUMNS)
            corner = (part * block + 12 + column * (SIDE + 70), 38 + row * (SIDE + 100))
            _cell(canvas, *corner, picture, names[int(images.labels[index])].label, guesses)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(out, optimize=True)

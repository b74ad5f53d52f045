"""`demo`: the files beside the demo encoders: label sets, the label tree, sample pictures and their credits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyvips
from PIL import Image
from safetensors import safe_open

from training.emoji.build import iconify_bodies
from training.emoji.packages import Package, fetch
from training.emoji.pictures import manifest_names, read_manifest
from training.emoji.render import render, svg_document
from training.emoji.taxonomy import GROUP_NAMES, SUBGROUP_NAMES, Name
from training.emoji.vendors import VENDORS
from training.jsonfile import write_json

TEMPLATES = ["an emoji of {}"]

# file name -> (vendor, icon). Noto is Apache-2.0, Twemoji is CC BY 4.0; subjects a stranger knows at a glance.
SAMPLES = {
    "carrot.png": ("noto", "carrot"),
    "cat-face.png": ("noto", "cat-face"),
    "pizza.jpg": ("noto", "pizza"),
    "bicycle.png": ("noto", "bicycle"),
    "guitar.png": ("twemoji", "guitar"),
    "rocket.webp": ("noto", "rocket"),
    "octopus.png": ("noto", "octopus"),
    "strawberry.jpg": ("twemoji", "strawberry"),
    "penguin.png": ("noto", "penguin"),
    "umbrella.webp": ("noto", "umbrella"),
    "hamburger.png": ("twemoji", "hamburger"),
    "sailboat.png": ("noto", "sailboat"),
}


def label_sets(names: list[Name]) -> dict[str, dict[str, Any]]:
    """The demo's label sets, as the library and `PUT /label-sets` read them: all names, subgroups, groups.

    A name's descriptions are its keywords; a subgroup's are its members.
    """
    members = {
        level: [
            {"name": node, "descriptions": [name.label for name in names if getattr(name, level) == node][:12]}
            for node in dict.fromkeys(getattr(name, level) for name in names)
        ]
        for level in ("subgroup", "group")
    }
    leaves = [
        {"name": name.label, "descriptions": list(name.tags)} if name.tags else {"name": name.label} for name in names
    ]
    sets = {"emoji": leaves, "emoji-subgroups": members["subgroup"], "emoji-groups": members["group"]}
    return {key: {"labels": labels, "templates": TEMPLATES} for key, labels in sets.items()}


def tree(names: list[Name]) -> dict[str, Any]:
    """The label tree: name > subgroup > group. No name is also a subgroup or a group (checked here)."""
    upper = {*SUBGROUP_NAMES.values(), *GROUP_NAMES.values()}
    shared = upper & {name.label for name in names}
    if shared:
        raise ValueError(f"these are labels and levels at once: {sorted(shared)}")
    parents = {name.label: name.subgroup for name in names} | {name.subgroup: name.group for name in names}
    return {"levels": ["name", "subgroup", "group"], "parents": parents}


def draw_icon(data: Path, vendor: str, index: int, size: int) -> Image.Image:
    """Draw picture number ``index`` of a vendor in a built data set afresh at ``size`` pixels, as RGBA."""
    manifest = read_manifest(data)
    with safe_open(data / manifest["vendors"][vendor]["file"], "np") as tensors:
        icon = json.loads(tensors.metadata()["icons"])[index]
    return _draw_sample(vendor, icon, data / "packages", size)


def _draw_sample(vendor: str, icon: str, packages: Path, size: int) -> Image.Image:
    body, box = iconify_bodies(Package(fetch(VENDORS[vendor].pin, packages)))[icon]
    return Image.fromarray(render(svg_document(body, box), size), "RGBA")


def _save(picture: Image.Image, path: Path) -> None:
    if path.suffix == ".png":
        picture.save(path, optimize=True)
        return
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    white.convert("RGB").save(path, quality=90)


def write_samples(folder: Path, packages: Path, size: int = 320) -> None:
    """Draw the sample pictures (PNG with transparency, JPEG, WebP) and their CREDITS.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Sample pictures", "", "| picture | subject | from | licence |", "| --- | --- | --- | --- |"]
    for file, (key, icon) in SAMPLES.items():
        vendor = VENDORS[key]
        _save(_draw_sample(key, icon, packages, size), folder / file)
        source = f"{vendor.credit} (`{vendor.pin.name}` {vendor.pin.version})"
        lines.append(f"| {file} | {icon.replace('-', ' ')} | {source} | {vendor.licence} |")
    version = f"{pyvips.version(0)}.{pyvips.version(1)}"
    lines += ["", f"Rendered at {size} px with libvips {version} by `python -m training demo`."]
    (folder / "CREDITS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_demo_files(data: Path, out: Path) -> None:
    """Write label sets, tree and samples below ``out`` from a built data set."""
    names = manifest_names(read_manifest(data))
    for key, content in label_sets(names).items():
        write_json(out / "label_sets" / f"{key}.json", content)
    write_json(out / "trees" / "emoji.json", tree(names))
    write_samples(out / "samples", data / "packages")

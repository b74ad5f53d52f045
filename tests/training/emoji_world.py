"""A made-up emoji world: a names package and icon packages as npm would deliver them."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from training.emoji.packages import Pin

EMOJI = [
    ("1F955", "carrot", ["vegetable", "root"], "food-vegetable", "#f80"),
    ("1F966", "broccoli", ["vegetable", "green"], "food-vegetable", "#080"),
    ("1F34E", "red apple", ["fruit", "red"], "food-fruit", "#e00"),
    ("1F34B", "lemon", ["fruit", "citrus"], "food-fruit", "#ee0"),
    ("1F431", "cat face", ["cat", "pet"], "animal-mammal", "#fa8"),
    ("1F436", "dog face", ["dog", "pet"], "animal-mammal", "#840"),
    ("1F1E9-1F1EA", "flag: Germany", ["flag"], "country-flag", "#000"),
]
GROUP_OF = {
    "food-vegetable": "food-drink",
    "food-fruit": "food-drink",
    "animal-mammal": "animals-nature",
    "country-flag": "flags",
}
SHAPES = ('<circle cx="8" cy="8" r="7" fill="{}"/>', '<rect x="1" y="3" width="14" height="9" fill="{}"/>')


def make_package(folder: Path, name: str, licence: str, files: dict[str, Any]) -> Pin:
    """Write an npm tarball for a pin into `folder`, and return the pin."""
    everything = {"package.json": {"name": name, "version": "1.0.0", "license": licence}, **files}
    pin = Pin(name, "1.0.0", "")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / pin.filename, "w:gz") as archive:
        for path, content in everything.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.sha512((folder / pin.filename).read_bytes()).digest()
    return Pin(name, "1.0.0", "sha512-" + base64.b64encode(digest).decode())


def make_names(folder: Path) -> Pin:
    """A package laid out like emojibase-data, with EMOJI in it."""
    subgroups = list(GROUP_OF)
    groups = list(dict.fromkeys(GROUP_OF.values()))
    data = [
        {
            "hexcode": code,
            "label": label,
            "tags": tags,
            "group": groups.index(GROUP_OF[subgroup]),
            "subgroup": subgroups.index(subgroup),
        }
        for code, label, tags, subgroup, _ in EMOJI
    ]
    data.append({"hexcode": "1F1EB", "label": "regional indicator F"})
    meta = {
        "groups": {str(i): key for i, key in enumerate(groups)},
        "subgroups": {str(i): key for i, key in enumerate(subgroups)},
    }
    files: dict[str, Any] = {"en/data.json": data, "meta/groups.json": meta}
    for table in ("cldr", "iamcal", "github", "emojibase", "joypixels"):
        files[f"en/shortcodes/{table}.json"] = {"1F34E": "apple"}
    return make_package(folder, "names", "MIT", files)


def make_icons(folder: Path, name: str = "@art/icons", licence: str = "MIT") -> Pin:
    """A package laid out like @iconify-json/*, one icon for each of EMOJI and one that is none."""
    slugs = ["carrot", "broccoli", "red-apple", "lemon", "cat-face", "dog-face", "flag-for-germany"]
    icons = {
        slug: {"body": SHAPES[i % 2].format(emoji[-1]) + f'<path d="M{i} 0h2v9z" fill="#125"/>'}
        for i, (slug, emoji) in enumerate(zip(slugs, EMOJI, strict=True))
    }
    icons["some-logo"] = {"body": SHAPES[0].format("#777")}
    files = {"icons.json": {"icons": icons, "width": 16, "height": 16}, "info.json": {"license": {"spdx": licence}}}
    return make_package(folder, name, licence, files)

"""`build-data`: packages -> one safetensors file of pictures per vendor, and a manifest of where all came from."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from safetensors.numpy import save_file

from training.emoji.fonts import font_glyphs
from training.emoji.matching import match_icons
from training.emoji.packages import Package, PackageError, Pin, check_licence, fetch
from training.emoji.render import RgbaImage, render, svg_document
from training.emoji.taxonomy import Name, code_points, read_names
from training.emoji.vendors import EMOJIBASE, EMOJIBASE_LICENCE, VENDORS, Vendor

MANIFEST = "manifest.json"
FORMAT = 1
# Thin and bold outlines; a name that takes more than one code point has no outline of its own in `font_glyphs`.
_FONT_ENDS = ("-300-normal.woff", "-700-normal.woff")


def iconify_bodies(package: Package) -> dict[str, tuple[str, tuple[float, float, float, float]]]:
    """Icon name (aliases included) -> SVG body and its box."""
    data = package.json("icons.json")
    size = (data.get("width", 16), data.get("height", data.get("width", 16)))
    bodies = {}
    for icon, fields in data["icons"].items():
        box = (fields.get("left", 0), fields.get("top", 0), fields.get("width", size[0]), fields.get("height", size[1]))
        bodies[icon] = (fields["body"], box)
    for alias, fields in data.get("aliases", {}).items():
        if set(fields) <= {"parent", "hidden"} and fields["parent"] in bodies:
            bodies.setdefault(alias, bodies[fields["parent"]])
    return bodies


def _is_font(path: str, vendor: Vendor) -> bool:
    return path.startswith(vendor.folder) and path.endswith(_FONT_ENDS)


def _sources(vendor: Vendor, package: Package, names: list[Name]) -> list[tuple[int, str, dict[str, bytes]]]:
    """Per matched icon: index of its name, the icon's own name, and style -> picture bytes."""
    by_code = {code_points(name.hexcode): index for index, name in enumerate(names)}
    if vendor.kind == "files":
        found = []
        for path, content in sorted(package.files.items()):
            index = by_code.get(code_points(Path(path).stem)) if path.startswith(vendor.folder) else None
            if index is not None:
                found.append((index, Path(path).stem, {"plain": content}))
        return found
    if vendor.kind == "font":
        glyphs = font_glyphs(content for path, content in sorted(package.files.items()) if _is_font(path, vendor))
        return [
            (by_code[code], f"{code}-{weight}", {vendor.styles[0]: svg_document(body, box)})
            for (code, weight), (body, box) in sorted(glyphs.items())
            if code in by_code
        ]
    bodies = iconify_bodies(package)
    chars = package.json("chars.json") if "chars.json" in package.files else {}
    if vendor.kind == "flags":
        codes = [icon for icon in bodies if re.fullmatch("[a-z]{2}", icon)]
        chars = {"-".join(f"{0x1F1E6 + ord(char) - ord('a'):X}" for char in code): code for code in codes}
        bodies = {code: bodies[code] for code in codes}
    matches = match_icons(bodies, names, chars, vendor.renamed if not vendor.exact else None, vendor.exact)
    seen: set[tuple[int, str]] = set()
    found = []
    for icon, index in sorted(matches.items()):
        body, box = bodies[icon]
        if (index, body) not in seen:
            seen.add((index, body))
            found.append((index, icon, {style: svg_document(body, box, style) for style in vendor.styles}))
    return found


def _draw(pictures: dict[str, bytes], size: int) -> dict[str, RgbaImage] | None:
    try:
        return {style: render(content, size) for style, content in pictures.items()}
    except pyvips.Error:
        return None


def _build_vendor(vendor: Vendor, names: list[Name], size: int, out: Path, packages: Path) -> dict[str, Any]:
    package = Package(fetch(vendor.pin, packages))
    licences = check_licence(package, vendor.licence)
    sources = _sources(vendor, package, names)
    with ThreadPoolExecutor() as pool:
        drawn = list(pool.map(partial(_draw, size=size), [pictures for _, _, pictures in sources]))
    kept = [(index, icon, done) for (index, icon, _), done in zip(sources, drawn, strict=True) if done]
    if not kept:
        raise PackageError(f"{vendor.pin.name}: no icon matched a name")
    tensors = {f"images.{style}": np.stack([done[style] for _, _, done in kept]) for style in vendor.styles}
    tensors["names"] = np.asarray([index for index, _, _ in kept], dtype=np.int32)
    path = out / f"{vendor.key}.safetensors"
    save_file(tensors, path, metadata={"icons": json.dumps([icon for _, icon, _ in kept])})
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "package": vendor.pin.name,
        "version": vendor.pin.version,
        "integrity": vendor.pin.integrity,
        "licence": vendor.licence,
        "licence_found": licences,
        "credit": vendor.credit,
        "role": vendor.role,
        "kind": vendor.kind,
        "exact": vendor.exact,
        "styles": list(vendor.styles),
        "pictures": len(kept),
        "names_covered": len({index for index, _, _ in kept}),
        "names_covered_without_flags": len({i for i, _, _ in kept if names[i].group != "flags"}),
        "not_drawn": [icon for (_, icon, _), done in zip(sources, drawn, strict=True) if not done],
    }


def build_data(
    out: Path, size: int = 96, vendors: list[Vendor] | None = None, names_from: Pin = EMOJIBASE
) -> dict[str, Any]:
    """Build the demo data set in ``out`` and return its manifest.

    Args:
        out: folder to write; packages are kept in ``out/packages`` and reused, so a second build needs no network.
        size: side of the stored pictures in pixels.
        vendors: which vendors to build; all of `VENDORS` if None.
        names_from: the package that holds names, keywords and tree.

    Raises:
        PackageError: a package cannot be had, was altered, or states another licence.
    """
    packages = out / "packages"
    taxonomy = Package(fetch(names_from, packages))
    names = read_names(taxonomy)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "size": size,
        "taxonomy": {
            "package": names_from.name,
            "version": names_from.version,
            "integrity": names_from.integrity,
            "licence": EMOJIBASE_LICENCE,
            "licence_found": check_licence(taxonomy, EMOJIBASE_LICENCE),
            "credit": "Emojibase by Miles Johnson; names and keywords from Unicode CLDR",
        },
        "vendors": {},
        "names": [name.to_json() for name in names],
    }
    for vendor in VENDORS.values() if vendors is None else vendors:
        manifest["vendors"][vendor.key] = entry = _build_vendor(vendor, names, size, out, packages)
        print(
            f"{vendor.key:22} {entry['pictures']:5} pictures, {entry['names_covered']:5} of {len(names)} names "
            f"({entry['names_covered_without_flags']} without flags), {vendor.licence}",
            flush=True,
        )
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest

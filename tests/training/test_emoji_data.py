"""The data set builder: licences, checksums, matching, drawing."""

import io
import json
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from tests.training.emoji_world import make_icons, make_names, make_package
from training.emoji.build import build_data
from training.emoji.fonts import font_glyphs
from training.emoji.matching import match_icons, slug
from training.emoji.packages import Package, PackageError, Pin, fetch
from training.emoji.pictures import load_vendor, manifest_names, read_manifest, training_vendors
from training.emoji.render import STYLES, render, svg_document
from training.emoji.taxonomy import GROUP_NAMES, SUBGROUP_NAMES, Name, read_names
from training.emoji.vendors import VENDORS, Vendor


def test_build_records_where_all_came_from(demo_data: Path) -> None:
    manifest = read_manifest(demo_data)
    art = manifest["vendors"]["art"]
    assert art["pictures"] == art["names_covered"] == 7
    assert art["names_covered_without_flags"] == 6
    assert art["licence_found"] == {"package.json": "MIT", "info.json": "MIT"}
    assert art["integrity"].startswith("sha512-")
    assert [name.label for name in manifest_names(manifest)][:2] == ["carrot", "broccoli"]
    assert training_vendors(manifest) == ["art"]


def test_pictures_are_rgba_squares_in_every_style(demo_data: Path) -> None:
    sources = load_vendor(demo_data, read_manifest(demo_data), "art")
    assert [source.style for source in sources] == ["plain", "line"]
    for source in sources:
        assert source.images.shape == (7, 32, 32, 4)
        assert source.images.dtype == torch.uint8
    assert not torch.equal(sources[0].images, sources[1].images)


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    pin = make_icons(tmp_path)
    (tmp_path / pin.filename).write_bytes(b"something else")
    with pytest.raises(PackageError, match="SHA-512"):
        fetch(pin, tmp_path)


def test_another_licence_is_refused(tmp_path: Path) -> None:
    names = make_names(tmp_path / "packages")
    pin = make_icons(tmp_path / "packages", licence="GPL-3.0")
    with pytest.raises(PackageError, match="expected the licence MIT"):
        build_data(tmp_path, 16, [Vendor("art", pin, "MIT", "Art")], names)


def test_a_second_build_reads_the_packages_it_has(tmp_path: Path) -> None:
    pin = make_icons(tmp_path)
    assert fetch(pin, tmp_path) == fetch(pin, tmp_path)
    assert "icons.json" in Package(tmp_path / pin.filename).files


def _name(label: str, *aliases: str, code: str = "1F600") -> Name:
    return Name(code, label, (), aliases, "smiling faces", "smileys and emotions")


def test_slugs() -> None:
    assert slug("flag: Côte d’Ivoire") == "flag-cote-divoire"
    assert slug("bread & butter") == "bread-and-butter"


def test_labels_win_over_aliases_and_ambiguous_aliases_mean_nothing() -> None:
    names = [_name("dog", "doggo", code="1F415"), _name("dog face", "dog", "pet", code="1F436")]
    names.append(_name("cat face", "kitty", "pet", code="1F431"))
    found = match_icons(["dog", "kitty", "pet", "dogface"], names)
    assert found == {"dog": 0, "kitty": 2, "dogface": 1}


def test_code_points_win_over_slugs_and_exact_takes_labels_only() -> None:
    names = [_name("red heart", "heart", code="2764-FE0F"), _name("anatomical heart", code="1FAC0")]
    assert match_icons(["heart"], names, chars={"2764": "heart"}) == {"heart": 0}
    assert match_icons(["heart"], names, exact=True) == {}
    assert match_icons(["red-heart"], names, exact=True) == {"red-heart": 0}


def test_rendering_keeps_the_aspect_ratio_and_transparency() -> None:
    wide = svg_document('<rect width="20" height="10" fill="#f00"/>', (0, 0, 20, 10))
    picture = render(wide, 16)
    assert picture.shape == (16, 16, 4)
    assert picture[0, 8, 3] == 0
    assert tuple(picture[8, 8]) == (255, 0, 0, 255)


def test_glyphs_of_a_font_stand_upright_in_their_boxes() -> None:
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "space", "corner"])
    builder.setupCharacterMap({0x20: "space", 0x1F600: "corner"})
    pen, empty = TTGlyphPen(None), TTGlyphPen(None)
    for contour in ([(100, 0), (200, 0), (200, 800), (100, 800)], [(200, 700), (500, 700), (500, 800), (200, 800)]):
        pen.moveTo(contour[0])
        for point in contour[1:]:
            pen.lineTo(point)
        pen.closePath()
    builder.setupGlyf({".notdef": empty.glyph(), "space": empty.glyph(), "corner": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (600, 0), "space": (600, 0), "corner": (600, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=0)
    builder.setupOS2(usWeightClass=700)
    file = io.BytesIO()
    builder.save(file)
    glyphs = font_glyphs([file.getvalue()])
    assert list(glyphs) == [("1F600", 700)]
    body, box = glyphs["1F600", 700]
    assert box == (100, -800, 400, 800)
    picture = render(svg_document(body, box), 80)
    assert picture[5, 50, 3] == 255  # the bar at the top, to the right
    assert picture[70, 25, 3] == 255  # the stem reaches the bottom
    assert picture[70, 50, 3] == 0


def test_picture_files_are_taken_from_the_vendors_folder(tmp_path: Path) -> None:
    square = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(square, "PNG")
    names = make_names(tmp_path / "packages")
    code = read_names(Package(fetch(names, tmp_path / "packages")))[0].hexcode.lower()
    files = {f"img/64/{code}.png": square.getvalue(), f"img/32/{code}.png": b"not looked at"}
    pin = make_package(tmp_path / "packages", "@test/files", "MIT", files)
    build_data(tmp_path, 16, [Vendor("files", pin, "MIT", "Files", kind="files", folder="img/64/")], names)
    (source,) = load_vendor(tmp_path, read_manifest(tmp_path), "files")
    assert source.names.tolist() == [0]
    assert source.images[0, 8, 8].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize("style", [style for style in STYLES if style != "plain"])
def test_redrawn_styles_have_dark_lines(style: str) -> None:
    body = '<rect x="4" y="4" width="8" height="8" fill="#ff0"/>'
    plain, redrawn = (render(svg_document(body, (0, 0, 16, 16), key), 64) for key in ("plain", style))
    dark = (redrawn[..., :3].max(-1) < 40) & (redrawn[..., 3] > 200)
    assert dark.any()
    assert not ((plain[..., :3].max(-1) < 40) & (plain[..., 3] > 200)).any()


def test_vendors_that_may_be_trained_on_are_permissive_or_attribution() -> None:
    for vendor in VENDORS.values():
        if vendor.role == "train":
            assert vendor.licence in {"MIT", "ISC", "Apache-2.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1"}
    assert {key for key, vendor in VENDORS.items() if vendor.role == "test"} == {"emojione", "openmoji"}
    assert all(vendor.pin.integrity.startswith("sha512-") for vendor in VENDORS.values())


def test_notice_credits_every_training_vendor() -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    for vendor in VENDORS.values():
        if vendor.role == "train":
            assert vendor.credit in notice
            assert vendor.pin.name in notice


def test_tree_levels_do_not_share_names() -> None:
    assert not set(SUBGROUP_NAMES.values()) & set(GROUP_NAMES.values())
    assert len(set(SUBGROUP_NAMES.values())) == len(SUBGROUP_NAMES)


def test_shipped_label_sets_and_tree_agree() -> None:
    demo = Path(__file__).parents[2] / "ironclip" / "demo"
    tree = json.loads((demo / "trees" / "emoji.json").read_text(encoding="utf-8"))
    sets = {
        key: [label["name"] for label in json.loads(path.read_text(encoding="utf-8"))["labels"]]
        for key in ("emoji", "emoji-subgroups", "emoji-groups")
        if (path := demo / "label_sets" / f"{key}.json")
    }
    assert {tree["parents"][name] for name in sets["emoji"]} == set(sets["emoji-subgroups"])
    assert {tree["parents"][name] for name in sets["emoji-subgroups"]} == set(sets["emoji-groups"])


def test_pins_name_their_tarballs_as_npm_does() -> None:
    assert Pin("@iconify-json/noto", "1.2.9", "").filename == "iconify-json-noto-1.2.9.tgz"

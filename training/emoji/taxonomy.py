"""Names, keywords and the three-level tree (group > subgroup > name) of the emoji, from ``emojibase-data``."""

from __future__ import annotations

import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

from training.emoji.packages import Package

SHORTCODE_SETS = ("cldr", "iamcal", "github", "emojibase", "joypixels")

GROUP_NAMES = {
    "smileys-emotion": "smileys and emotions",
    "people-body": "people and body",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
    "flags": "flags",
}

# What a person would call each subgroup; emojibase's own messages ("asian", "with hats") need their group to be read.
SUBGROUP_NAMES = {
    "face-smiling": "smiling faces",
    "face-affection": "affectionate faces",
    "face-tongue": "faces with tongue",
    "face-hand": "faces with hands",
    "face-neutral-skeptical": "neutral or skeptical faces",
    "face-sleepy": "sleepy faces",
    "face-unwell": "unwell faces",
    "face-hat": "faces with hats",
    "face-glasses": "faces with glasses",
    "face-concerned": "concerned faces",
    "face-negative": "angry faces",
    "face-costume": "costumed faces and creatures",
    "cat-face": "cat faces",
    "monkey-face": "monkey faces",
    "heart": "hearts",
    "emotion": "emotion symbols",
    "hand-fingers-open": "hands with open fingers",
    "hand-fingers-partial": "hand signs",
    "hand-single-finger": "pointing fingers",
    "hand-fingers-closed": "closed hands",
    "hands": "pairs of hands",
    "hand-prop": "hands holding things",
    "body-parts": "body parts",
    "person": "persons",
    "person-gesture": "people gesturing",
    "person-role": "people at work",
    "person-fantasy": "fantasy people",
    "person-activity": "people in motion",
    "person-sport": "people doing sports",
    "person-resting": "people resting",
    "family": "couples and families",
    "person-symbol": "people symbols",
    "animal-mammal": "mammals",
    "animal-bird": "birds",
    "animal-amphibian": "amphibians",
    "animal-reptile": "reptiles",
    "animal-marine": "marine animals",
    "animal-bug": "bugs",
    "plant-flower": "flowers",
    "plant-other": "plants",
    "food-fruit": "fruits",
    "food-vegetable": "vegetables",
    "food-prepared": "prepared food",
    "food-asian": "asian food",
    "food-sweet": "sweets",
    "drink": "drinks",
    "dishware": "dishware",
    "place-map": "globes and maps",
    "place-geographic": "landscapes",
    "place-building": "buildings",
    "place-religious": "religious buildings",
    "place-other": "places",
    "transport-ground": "ground vehicles",
    "transport-water": "boats and ships",
    "transport-air": "aircraft",
    "hotel": "hotel things",
    "time": "clocks and time",
    "sky-weather": "sky and weather",
    "event": "events and holidays",
    "award-medal": "awards and medals",
    "sport": "sports equipment",
    "game": "games and toys",
    "arts-crafts": "arts and crafts",
    "clothing": "clothing",
    "sound": "sound symbols",
    "music": "music equipment",
    "musical-instrument": "musical instruments",
    "phone": "phones",
    "computer": "computer equipment",
    "light-video": "light and video equipment",
    "book-paper": "books and papers",
    "money": "money things",
    "mail": "mail and packages",
    "writing": "writing tools",
    "office": "office supplies",
    "lock": "locks and keys",
    "tool": "tools",
    "science": "science equipment",
    "medical": "medical things",
    "household": "household items",
    "other-object": "other objects",
    "transport-sign": "transport signs",
    "warning": "warning signs",
    "arrow": "arrows",
    "religion": "religious symbols",
    "zodiac": "zodiac signs",
    "av-symbol": "audio and video buttons",
    "gender": "gender signs",
    "math": "math symbols",
    "punctuation": "punctuation marks",
    "currency": "currency symbols",
    "other-symbol": "other symbols",
    "keycap": "keycaps",
    "alphanum": "letter and word signs",
    "geometric": "geometric shapes",
    "flag": "plain and signal flags",
    "country-flag": "country flags",
    "subdivision-flag": "regional flags",
}


@dataclass(frozen=True)
class Name:
    """One emoji: a leaf of the tree, with the words people use for it."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    aliases: tuple[str, ...]
    subgroup: str
    group: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Name:
        """The inverse of `to_json`."""
        return cls(**{**fields, "tags": tuple(fields["tags"]), "aliases": tuple(fields["aliases"])})


def code_points(hexcode: str) -> str:
    """A code-point sequence in one spelling: upper case, dashes, without the variation selector FE0F."""
    return "-".join(part for part in hexcode.upper().replace("_", "-").split("-") if part != "FE0F")


def _unicode_name(hexcode: str) -> str:
    plain = code_points(hexcode)
    return "" if "-" in plain else unicodedata.name(chr(int(plain, 16)), "").lower()


def read_names(package: Package) -> list[Name]:
    """All base emoji (no skin tones, no components) in Unicode order.

    ``aliases`` are other names for the same emoji, best first: CLDR and product short codes, then the Unicode
    character name.
    """
    indices = package.json("meta/groups.json")
    shortcodes = [package.json(f"en/shortcodes/{name}.json") for name in SHORTCODE_SETS]
    names = []
    for entry in package.json("en/data.json"):
        if entry.get("group") is None or indices["groups"][str(entry["group"])] == "component":
            continue
        aliases: list[str] = []
        for table in shortcodes:
            codes = table.get(entry["hexcode"], [])
            aliases += [codes] if isinstance(codes, str) else codes
        aliases.append(_unicode_name(entry["hexcode"]))
        words = dict.fromkeys(alias.replace("_", " ") for alias in aliases if alias)
        names.append(
            Name(
                hexcode=entry["hexcode"],
                label=entry["label"],
                tags=tuple(entry.get("tags", ())),
                aliases=tuple(word for word in words if word != entry["label"]),
                subgroup=SUBGROUP_NAMES[indices["subgroups"][str(entry["subgroup"])]],
                group=GROUP_NAMES[indices["groups"][str(entry["group"])]],
            )
        )
    return names

"""Which icon of a vendor shows which emoji: by code points where the vendor gives them, else by its slug."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from training.emoji.taxonomy import Name, code_points

_FLAG = re.compile(r"^flag-for-(?:flag-)?")
_VARIANT = re.compile(r"-\d$")


def slug(text: str) -> str:
    """ASCII lower case with single dashes: ``Côte d'Ivoire`` -> ``cote-divoire``."""
    plain = unicodedata.normalize("NFKD", text.replace("&", " and ").replace("’", "").replace("'", ""))
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def slug_table(names: list[Name]) -> dict[str, int]:
    """Slug (and slug without dashes) -> index of the one name it can mean.

    Labels win over aliases, earlier aliases over later ones; a slug that two names claim at the same rank means
    neither.
    """
    table: dict[str, int] = {}
    depth = 1 + max((len(name.aliases) for name in names), default=0)
    for rank in range(depth):
        claims: dict[str, set[int]] = defaultdict(set)
        for index, name in enumerate(names):
            words = (name.label, *name.aliases)
            if rank < len(words):
                key = slug(words[rank])
                claims[key].add(index)
                claims[key.replace("-", "")].add(index)
        for key, owners in claims.items():
            if key and len(owners) == 1:
                table.setdefault(key, next(iter(owners)))
    return table


def _candidates(icon: str) -> Iterable[str]:
    yield icon
    if _FLAG.match(icon):
        yield _FLAG.sub("flag-", icon)
    stem = icon
    for suffix in ("-button", "-flag", "-face", "-symbol"):
        yield f"{icon}{suffix}"
        stem = stem.removesuffix(suffix)
    yield stem
    yield _VARIANT.sub("", icon)
    yield icon.replace("-", "")


def match_icons(
    icons: Iterable[str],
    names: list[Name],
    chars: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
    exact: bool = False,
) -> dict[str, int]:
    """Map icon names to indices into ``names``.

    Args:
        icons: the vendor's icon names.
        names: the emoji.
        chars: code points -> icon name, where the vendor has such a table; it wins over slugs.
        renamed: icon name -> emoji label, for the vendor's own odd names.
        exact: take a slug only when it is a label itself (for general icon sets, where an alias says too little).

    Returns:
        icon -> index; icons that mean no emoji (skin tones, logos) are left out.
    """
    by_code = {code_points(name.hexcode): index for index, name in enumerate(names)}
    by_label = {slug(name.label): index for index, name in enumerate(names)}
    table = by_label if exact else slug_table(names)
    found: dict[str, int] = {}
    for code, icon in (chars or {}).items():
        if code_points(code) in by_code:
            found[icon] = by_code[code_points(code)]
    taken = set(found.values())
    for icon in icons:
        if icon in found:
            continue
        if renamed and icon in renamed:
            found[icon] = by_label[slug(renamed[icon])]
            continue
        for candidate in [icon] if exact else _candidates(icon):
            index = table.get(candidate)
            if index is not None and index not in taken:
                found[icon] = index
                break
    return found

"""What a watched folder has: artifacts that are encoders by the names of their subfolders, and whether each is whole.

A subfolder called `NAME` is the encoder of that name, one called `NAME@canary=0.05` a version that is tried on that
share of its requests. The share stands in the folder's name, so that a rename or a link changes it in one step, and an
artifact that is read-only, or that several names lead to, can be tried as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

from ironclip.artifact import CONFIG_FILE, META_FILE, WEIGHTS_FILE, read_meta
from ironclip.errors import ArtifactError
from service.settings import DEFAULT_ALIAS, NAME_PATTERN

_MOST_HEADER = 100_000_000  # bytes of a safetensors header at most, as its own readers have it
_CANARY = re.compile(r"(?P<name>[^@]+)@canary=(?P<share>0?\.[0-9]{1,6})")


@dataclass(frozen=True)
class Role:
    """What a subfolder is for: an encoder's name, and the share of its requests if it is a canary."""

    name: str
    share: float = 0.0

    @property
    def slot(self) -> str:
        """The same for whatever share: an encoder has one canary at most."""
        return self.canary_slot if self.share else self.name

    @property
    def canary_slot(self) -> str:
        """That of the encoder's canary; it comes behind the encoder's own."""
        return f"{self.name}@canary"


def role_of(folder: str) -> Role | None:
    """What a subfolder of this name is for; None for what can be no encoder."""
    canary = _CANARY.fullmatch(folder)
    role = Role(canary["name"], float(canary["share"])) if canary is not None else Role(folder)
    if canary is not None and not role.share:
        return None
    return role if re.fullmatch(NAME_PATTERN, role.name) and role.name != DEFAULT_ALIAS else None


@dataclass(frozen=True)
class Sight:
    """One subfolder as it was seen.

    Attributes:
        path: the real folder.
        fingerprint: of it and its files; another one where anything has been put in another's place.
        content: of the files alone: it stays when they are moved, or linked to.
        fault: what is missing, if anything.
        folder: what the subfolder is called.
        role: what it is for.
    """

    path: str
    fingerprint: str
    content: str = ""
    fault: str = ""
    folder: str = ""
    role: Role = Role("")


def see(folder: Path) -> Sight:
    """Look at one artifact; blocks. Raises OSError for what cannot be read, also where it goes away meanwhile."""
    real = Path(os.path.realpath(folder))
    marks: list[object] = [str(real)]
    content: list[object] = []
    for path in sorted(real.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        stat = path.stat()
        marks.append((path.name, os.path.realpath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        content.append((path.name, stat.st_size, stat.st_mtime_ns))
    meta = real / META_FILE
    if meta.is_file():
        # It has the weights' checksum.
        content.append(hashlib.sha256(meta.read_bytes()).hexdigest())
    return Sight(str(real), _digest([marks, content]), _digest(content), _missing(real))


def _digest(marks: list[object]) -> str:
    return hashlib.sha256(repr(marks).encode()).hexdigest()


def _missing(folder: Path) -> str:
    """What an artifact lacks; "" for one that is complete."""
    for name in (META_FILE, CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            return f"it has no {name}"
    try:
        read_meta(folder)
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ArtifactError, ValueError, RecursionError):
        return f"{META_FILE} or {CONFIG_FILE} cannot be read"
    with (folder / WEIGHTS_FILE).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(size, _MOST_HEADER):
            return f"{WEIGHTS_FILE} is not complete"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            return f"{WEIGHTS_FILE} cannot be read"
    return "" if whole == size else f"{WEIGHTS_FILE} has {size} bytes of {whole}"


def unchanged(sight: Sight) -> bool:
    """Whether a folder is what it was when it was seen; blocks."""
    try:
        return see(Path(sight.path)).fingerprint == sight.fingerprint
    except OSError:
        return False


def scan(folder: Path, told: Callable[[str, str], None], kept: Container[str]) -> dict[str, Sight]:
    """Every subfolder that may be an encoder, by its slot; blocks.

    Args:
        folder: that is watched.
        told: is told of a subfolder that is left out, and why.
        kept: names of encoders that no folder takes the place of.

    Raises:
        OSError: the folder itself cannot be read.
    """
    seen: dict[str, Sight] = {}
    for called in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        if called.startswith((".", "lost+found")):
            continue
        role = role_of(called)
        if role is None:
            told(called, f"is no encoder: its name is {NAME_PATTERN} and not 'default', or with @canary=0.05 behind it")
        elif role.name in kept and not role.share:
            told(called, "is an encoder of IRONCLIP_ENCODERS, which stays")
        else:
            try:
                sight = see(folder / called)
            except OSError as error:  # it changes under our hands
                sight = Sight("", "", fault=error.strerror or "cannot be read")
            if role.slot in seen:
                sight = Sight("", "", fault=f"{seen[role.slot].folder} is a canary of it too")
            seen[role.slot] = replace(sight, folder=called, role=role)
    return seen

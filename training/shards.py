"""Webdataset shards read by index: tar files of ``key.jpg`` beside ``key.cls`` (or ``key.json``).

The webdataset library streams shards in turn, so it cannot come back to the middle of an epoch; here each member's
place is noted once and read from there, and a resumed run sees the very batches that it would have seen.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ironclip.errors import InputError
from ironclip.preprocessing import Preprocessing, to_float
from training.data import SUFFIXES

CLASSES = "classes.json"


@dataclass(frozen=True)
class _Member:
    shard: int
    offset: int
    size: int


class ShardImages:
    """All ``*.tar`` files of a folder as `training.data.LabelledImages`; classes from ``classes.json`` beside them.

    A sample is a picture and a label with the same key: ``.cls`` holds the class's number as text, ``.json`` an object
    with ``"label"`` or ``"cls"``. Without a ``classes.json`` (a list of names) the numbers are the names.

    Raises:
        InputError: no shard, a sample without picture or label, or a label beyond the names.
    """

    def __init__(self, root: Path, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        self._shards = sorted(root.glob("*.tar"))
        if not self._shards:
            raise InputError(f"no shard (*.tar) in {root}")
        self._members: list[_Member] = []
        labels: list[int] = []
        for number, shard in enumerate(self._shards):
            for key, (member, label) in _index(number, shard).items():
                if member is None or label is None:
                    raise InputError(f"{shard}: the sample {key!r} has no {'picture' if member is None else 'label'}")
                self._members.append(member)
                labels.append(label)
        self.labels = torch.tensor(labels)
        names = root / CLASSES
        found = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else None
        self.classes: Sequence[str] = found or [str(number) for number in range(int(self.labels.max()) + 1)]
        if int(self.labels.max()) >= len(self.classes) or int(self.labels.min()) < 0:
            raise InputError(f"{root}: labels go to {int(self.labels.max())}, there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self._members)

    def images(self, indices: Sequence[int]) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, side, side]."""
        pictures = []
        for index in indices:
            member = self._members[index]
            with self._shards[member.shard].open("rb") as handle:
                handle.seek(member.offset)
                content = handle.read(member.size)
            with Image.open(io.BytesIO(content)) as picture:
                pictures.append(self._preprocessing(picture)[0])
        return to_float(torch.stack(pictures))


def _index(number: int, shard: Path) -> dict[str, tuple[_Member | None, int | None]]:
    """Key -> place of the picture and the label, in the shard's order."""
    found: dict[str, tuple[_Member | None, int | None]] = {}
    with tarfile.open(shard, "r:") as archive:
        for entry in archive:
            if not entry.isfile():
                continue
            # A key goes up to the first dot of the file's name, as webdataset has it.
            folder, _, name = entry.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}"
            member, label = found.get(key, (None, None))
            if f".{extension.lower()}" in SUFFIXES:
                member = _Member(number, entry.offset_data, entry.size)
            elif extension in ("cls", "json") and (handle := archive.extractfile(entry)) is not None:
                content = handle.read()
                value = json.loads(content)
                label = int(value["label" if "label" in value else "cls"] if isinstance(value, dict) else value)
            else:
                continue
            found[key] = (member, label)
    return found

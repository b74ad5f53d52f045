"""One small interface for labelled pictures, and folders and torchvision sets behind it.

Pixels are float RGB in [0,1] [N, 3, side, side]: mean and standard deviation live in the Encoder, so no data set
normalises. `training.emoji.pictures` is the demo's own implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ironclip.errors import InputError
from ironclip.preprocessing import Preprocessing, to_float

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


class LabelledImages(Protocol):
    """Pictures with class labels, by index."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; labels are positions in it."""

    @property
    def labels(self) -> Tensor:
        """int64 [len]: the class of each picture."""

    def __len__(self) -> int:
        """Number of pictures."""

    def images(self, indices: Sequence[int]) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, side, side]."""


class FolderImages:
    """``root/<class name>/<picture>``, the ImageFolder layout; classes sorted by name.

    Raises:
        InputError: no picture below ``root``.
    """

    def __init__(self, root: Path, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        self._files = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise InputError(f"no picture ({', '.join(sorted(SUFFIXES))}) in a class folder below {root}")
        self.classes: Sequence[str] = sorted({path.parent.name for path in self._files})
        positions = {name: position for position, name in enumerate(self.classes)}
        self.labels = torch.tensor([positions[path.parent.name] for path in self._files])

    def __len__(self) -> int:
        return len(self._files)

    def images(self, indices: Sequence[int]) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, side, side]."""
        pictures = []
        for index in indices:
            with Image.open(self._files[index]) as picture:
                pictures.append(self._preprocessing(picture)[0])
        return to_float(torch.stack(pictures))


class TorchvisionImages:
    """A torchvision classification set that yields (PIL image, label) and names its classes."""

    def __init__(self, dataset: Any, preprocessing: Preprocessing) -> None:
        self._dataset = dataset
        self._preprocessing = preprocessing
        self.classes: Sequence[str] = list(dataset.classes)
        targets = getattr(dataset, "targets", None)
        self.labels = torch.as_tensor(targets if targets is not None else [label for _, label in dataset])

    def __len__(self) -> int:
        return len(self._dataset)

    def images(self, indices: Sequence[int]) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, side, side]."""
        return to_float(torch.stack([self._preprocessing(self._dataset[index][0])[0] for index in indices]))

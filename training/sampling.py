"""Which pictures a training step sees: drawn by weight, from the step's own generator."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.emoji.pictures import Source, load_vendor, manifest_names, read_manifest, training_vendors
from training.emoji.taxonomy import Name


class Sampler:
    """Pictures of a batch: drawn by weight, gathered from the vendors' arrays.

    Args:
        sources: what to draw from.
        flags: bool [names], which names are flags.
        style_weights: how often a picture is drawn, by its style; ``icon`` for the vendors in ``icon_sets``.
        flag_weight: how often a flag is drawn, beside 1 for other names.
        icon_sets: vendors that are general icon sets.

    Attributes:
        names: int64 [pictures].
        weights: float32 [pictures], how often each is drawn.
    """

    def __init__(
        self,
        sources: list[Source],
        flags: Tensor,
        style_weights: Mapping[str, float],
        flag_weight: float,
        icon_sets: Container[str] = (),
    ) -> None:
        self._sources = sources
        style = [style_weights["icon" if s.vendor in icon_sets else s.style] for s in sources]
        self.names = torch.cat([source.names for source in sources])
        weights = torch.cat([torch.full((len(s.names),), w) for s, w in zip(sources, style, strict=True)])
        total = torch.zeros(len(flags)).index_add_(0, self.names, weights)
        of_name = torch.where(flags, flag_weight, 1.0)
        # Names with many pictures come up more often, but only as the square root of their number.
        self.weights = weights * of_name[self.names] / total[self.names].sqrt()
        self._source = torch.cat([torch.full((len(s.names),), i) for i, s in enumerate(sources)])
        self._row = torch.cat([torch.arange(len(s.names)) for s in sources])

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` pictures: uint8 RGBA [count, size, size, 4] and their names int64 [count]."""
        chosen = torch.multinomial(self.weights, count, replacement=False, generator=generator)
        return self.gather(chosen), self.names[chosen]

    def gather(self, chosen: Tensor) -> Tensor:
        """The pictures at these positions (int64 [n]): uint8 RGBA [n, size, size, 4]."""
        source, row = self._source[chosen], self._row[chosen]
        size = self._sources[0].images.shape[1]
        images = torch.empty(len(chosen), size, size, 4, dtype=torch.uint8)
        for index in torch.unique(source).tolist():
            where = source == index
            images[where] = self._sources[index].images[row[where]]
        return images


def emoji_sampler(
    folder: Path, left_out: Sequence[str], style_weights: Mapping[str, float], flag_weight: float
) -> tuple[Sampler, list[Name]]:
    """The training vendors' pictures of a built data set without those left out, and all its names."""
    manifest = read_manifest(folder)
    names = manifest_names(manifest)
    vendors = training_vendors(manifest, left_out)
    icon_sets = {key for key in vendors if manifest["vendors"][key].get("exact")}
    sources = [source for key in vendors for source in load_vendor(folder, manifest, key)]
    flags = torch.tensor([name.group == "flags" for name in names])
    return Sampler(sources, flags, style_weights, flag_weight, icon_sets), names

"""What a robust-training run sees at each step: pictures by index, and orders of indices that depend on the step alone.

A step's batch is a function of (seed, step, rank), so a run resumes at any step without replaying what came before, and
worker processes prepare whole batches ahead of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ironclip.errors import InputError, OptionError
from ironclip.hierarchy import LabelTree
from ironclip.preprocessing import Preprocessing
from training.augment import AugmentConfig, augment
from training.data import FolderImages, LabelledImages, TorchvisionImages
from training.emoji.pictures import load_vendor, read_manifest
from training.sampling import Sampler, emoji_sampler
from training.shards import ShardImages


@dataclass(frozen=True)
class DataConfig:
    """Which pictures a run learns from.

    Attributes:
        kind: ``emoji`` (the built demo data), ``folder`` (``path/class/picture``), ``torchvision`` (a set of theirs) or
            ``shards`` (webdataset tar files).
        path: folder of the data.
        dataset: name of the torchvision set, and ``options`` its further arguments.
        classes: what to call the classes: empty as the data does, ``imagenet`` for open_clip's names of ImageNet's
            1,000 sorted folders, or a JSON file {class: name}.
        templates: prompt templates of the class texts; the encoder's own if empty.
        left_out: training vendors kept out (``emoji``).
        style_weights, flag_weight: how often an emoji picture is drawn, as in pre-training.
        augment: random views of emoji art; none (and a fixed picture for each index) if absent.
        tree, per_parent: a label tree (JSON) over the classes, and how many pictures of one parent of its first level
            above the classes a batch holds together; 0 draws without regard to it.
        workers: processes that prepare batches ahead; 0 prepares them in the run's own process.
    """

    kind: Literal["emoji", "folder", "torchvision", "shards"] = "emoji"
    path: str = "data/demo"
    dataset: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    classes: str = ""
    templates: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    style_weights: dict[str, float] = field(
        default_factory=lambda: {"plain": 1.0, "outlined": 0.5, "line": 0.3, "icon": 0.5}
    )
    flag_weight: float = 0.3
    augment: AugmentConfig | None = None
    tree: str = ""
    per_parent: int = 0
    workers: int = 0


class Source(Protocol):
    """Training pictures by index."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, as the prompts say them."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]: the class of each picture."""

    @property
    def weights(self) -> Tensor | None:
        """float [N], how often each picture is drawn; None for each once an epoch."""

    @property
    def fixed(self) -> bool:
        """Whether an index always gives the same pixels, so that what a frozen tower says of it can be kept."""

    def pixels(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, R, R]."""

    def probe(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Up to ``count`` pictures to watch a run on, as they are: float [n, 3, R, R] and labels int64 [n]."""


def _some(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


class PlainSource:
    """Any `LabelledImages`, each once an epoch, as its preprocessing leaves it."""

    weights: Tensor | None = None
    fixed = True

    def __init__(self, images: LabelledImages, classes: Sequence[str]) -> None:
        self._images = images
        self.classes: Sequence[str] = classes
        self.labels = images.labels

    def pixels(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, R, R]."""
        return self._images.images(indices.tolist())

    def probe(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Of the training pictures."""
        chosen = _some(len(self.labels), count, seed)
        return self._images.images(chosen.tolist()), self.labels[chosen]


AS_IT_IS = AugmentConfig(
    (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, gray=0.0, lines=0.0, background=0.0, noise=0.0, blur=0.0, erase=0.0
)


class EmojiSource:
    """Training vendors' art, drawn by weight, in random views or as it is."""

    def __init__(self, config: DataConfig, preprocessing: Preprocessing) -> None:
        folder = Path(config.path)
        self._sampler, names = emoji_sampler(folder, config.left_out, config.style_weights, config.flag_weight)
        manifest = read_manifest(folder)
        held = [load_vendor(folder, manifest, key)[0] for key in config.left_out]
        no_flags = torch.zeros(len(names), dtype=torch.bool)
        self._held = Sampler(held, no_flags, {"plain": 1.0, "line": 1.0}, 1.0) if held else None
        self._size = preprocessing.resolution
        # Without an augmentation the art is only resized, onto white as the demo's preprocessing has it.
        self._augment = config.augment or AS_IT_IS
        self.fixed = config.augment is None
        self.classes: Sequence[str] = [name.label for name in names]
        self.labels = self._sampler.names
        self.weights: Tensor | None = self._sampler.weights

    def pixels(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, R, R]."""
        return augment(self._sampler.gather(indices), self._size, self._augment, generator)

    def probe(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Of the left-out vendors where there are any, else of the training pictures."""
        sampler = self._held or self._sampler
        chosen = _some(len(sampler), count, seed)
        pixels = augment(sampler.gather(chosen), self._size, AS_IT_IS, torch.Generator().manual_seed(seed))
        return pixels, sampler.names[chosen]


def _named(classes: Sequence[str], names: str) -> list[str]:
    if not names:
        return distinct([name.replace("_", " ") for name in classes])
    if names == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        if len(classes) != len(IMAGENET_CLASSNAMES):
            raise InputError(
                f"classes = imagenet names {len(IMAGENET_CLASSNAMES)} classes, the data has {len(classes)}"
            )
        return distinct(IMAGENET_CLASSNAMES)
    table = json.loads(Path(names).read_text(encoding="utf-8"))
    missing = [name for name in classes if name not in table]
    if missing:
        raise InputError(f"{names} names no class {missing[0]!r} ({len(missing)} are missing)")
    return distinct([str(table[name]) for name in classes])


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which no two are alike: a later one is numbered. ImageNet calls two pairs of its classes alike."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result


def make_source(config: DataConfig, preprocessing: Preprocessing) -> Source:
    """The pictures of a config, through the encoder's own preprocessing.

    Raises:
        InputError: no such data.
        OptionError: no such torchvision set.
    """
    if config.kind == "emoji":
        return EmojiSource(config, preprocessing)
    images: LabelledImages
    if config.kind == "folder":
        images = FolderImages(Path(config.path), preprocessing)
    elif config.kind == "shards":
        images = ShardImages(Path(config.path), preprocessing)
    else:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, config.dataset, None)
        if kind is None or not config.dataset:
            raise OptionError(f"torchvision has no data set {config.dataset!r}")
        images = TorchvisionImages(kind(config.path, **config.options), preprocessing)
    return PlainSource(images, _named(images.classes, config.classes))


def parents_of(config: DataConfig, source: Source) -> Tensor | None:
    """int64 [N], which parent each picture belongs to, where batches are to be made of parents.

    Raises:
        InputError: no such tree.
    """
    if not config.per_parent:
        return None
    path = Path(config.tree)
    if not path.is_file():
        raise InputError(f"data.per_parent needs data.tree, the path of a label tree; there is none at {config.tree!r}")
    levels = LabelTree.parse(json.loads(path.read_text(encoding="utf-8"))).bind(source.classes).levels
    return levels[min(1, len(levels) - 1)].index[source.labels]


def parent_batch(source: Source, parents: Tensor, per_parent: int, step: int, batch_size: int, seed: int) -> Tensor:
    """A batch of whole families: int64 [batch_size], ``per_parent`` pictures for each of some parents, drawn by weight.

    Parents are drawn by the weights of their pictures; one with fewer pictures gives all it has, and others fill up,
    with more than ``per_parent`` of their own where there are too few parents.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    weights = torch.ones(len(parents)) if source.weights is None else source.weights
    mass = torch.zeros(int(parents.max()) + 1).index_add_(0, parents, weights)
    order = torch.multinomial(mass, int((mass > 0).sum()), generator=generator)
    # Within a family by weight: the smallest of exponentials over weights (Efraimidis and Spirakis 2006).
    keys = torch.empty(len(parents)).exponential_(generator=generator) / weights
    chosen: list[Tensor] = []
    taken = 0
    while sum(map(len, chosen)) < min(batch_size, len(parents)):
        for parent in order.tolist():
            members = torch.nonzero(parents == parent).flatten()
            chosen.append(members[torch.argsort(keys[members])[taken : taken + per_parent]])
            if sum(map(len, chosen)) >= batch_size:
                break
        taken += per_parent
    return torch.cat(chosen)[:batch_size]


def batch_indices(source: Source, step: int, batch_size: int, seed: int) -> Tensor:
    """The whole batch of a step, over all ranks: int64 [batch_size].

    Without weights each picture comes once an epoch, in an order of the epoch's own; the epoch's last batch is filled
    from the next epoch. With weights a batch is drawn without replacement.
    """
    if source.weights is not None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return torch.multinomial(source.weights, batch_size, generator=generator)
    count = len(source.labels)
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // count, (last - 1) // count + 1):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        parts.append(order[max(0, first - epoch * count) : max(0, last - epoch * count)])
    return torch.cat(parts)


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step.

    Attributes:
        pixels: float RGB in [0,1], [b, 3, R, R].
        labels: int64 [b].
        indices: int64 [b], positions in the source.
        positions: int64 [b], places in the whole batch.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    positions: Tensor


class _Steps(Dataset[StepBatch]):
    """Maps a step to this rank's batch."""

    def __init__(self, source: Source, indices: Callable[[int], Tensor], seed: int, rank: int, ranks: int) -> None:
        self._source, self._indices, self._seed, self._rank, self._ranks = source, indices, seed, rank, ranks

    def __getitem__(self, step: int) -> StepBatch:
        everyone = self._indices(step)
        share = len(everyone) // self._ranks
        positions = torch.arange(self._rank * share, (self._rank + 1) * share)
        indices = everyone[positions]
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * self._ranks + self._rank)
        return StepBatch(self._source.pixels(indices, generator), self._source.labels[indices], indices, positions)


def _as_it_is(batch: Any) -> Any:
    return batch


def step_batches(
    source: Source,
    steps: range,
    batch_size: int,
    *,
    seed: int,
    config: DataConfig | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader[StepBatch]:
    """This rank's batches for ``steps``, in order, prepared ahead by ``config.workers`` processes.

    Raises:
        OptionError: the batch cannot be split among the ranks.
    """
    if batch_size % ranks:
        raise OptionError(f"batch_size {batch_size} cannot be split among {ranks} processes")
    config = config or DataConfig()
    parents, workers = parents_of(config, source), config.workers
    if parents is None:
        indices = partial(batch_indices, source, batch_size=batch_size, seed=seed)
    else:
        indices = partial(parent_batch, source, parents, config.per_parent, batch_size=batch_size, seed=seed)
    return DataLoader(
        _Steps(source, indices, seed, rank, ranks),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=4 if workers else None,
    )

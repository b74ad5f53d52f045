"""Captions for named pictures, and which pictures each caption is true of.

A caption is a template around a *concept*: a name or one of its aliases, a keyword, a subgroup, a group. Several
pictures of a batch can share a concept ("a picture of a vegetable"), so every concept carries its members, and the
loss leaves the known other truths out of the denominator instead of pushing them away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.emoji.taxonomy import SUBGROUP_NAMES, Name

TEMPLATES = (
    "an emoji of {}",
    "an emoji of {}",
    "an emoji of a {}",
    "{}",
    "a {} emoji",
    "a picture of {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a photo of a {}",
    "an image of {}",
    "an icon of a {}",
    "this is a {}",
    "a symbol for {}",
    "clip art of {}",
)

KINDS = ("name", "alias", "tag", "subgroup", "group")


def singular(words: str) -> str:
    """A plural phrase in the singular, near enough: ``marine animals`` -> ``marine animal``."""
    for suffix, replacement in (("ies", "y"), ("ches", "ch"), ("sses", "ss"), ("shes", "sh")):
        if words.endswith(suffix):
            return words.removesuffix(suffix) + replacement
    return words.removesuffix("s") if not words.endswith("ss") else words


@dataclass(frozen=True)
class Caption:
    """A text and the index of its concept in `CaptionTable.members`."""

    text: str
    concept: int


class CaptionTable:
    """All concepts over a list of names.

    Attributes:
        members: bool [concepts, names]; row c marks the names that concept c is true of.
        subgroups, groups: the distinct names of the two upper levels, sorted.
        subgroup_of, group_of: int64 [names], positions in them.
    """

    def __init__(self, names: Sequence[Name]) -> None:
        self.labels = [name.label for name in names]
        self.subgroups = sorted({name.subgroup for name in names})
        self.groups = sorted({name.group for name in names})
        self.subgroup_of = torch.tensor([self.subgroups.index(name.subgroup) for name in names])
        self.group_of = torch.tensor([self.groups.index(name.group) for name in names])
        self.words: list[str] = []
        ids: dict[str, int] = {}
        owners: dict[int, set[int]] = defaultdict(set)
        self._by_kind: list[dict[str, list[int]]] = []
        keys = {readable: key.replace("-", " ") for key, readable in SUBGROUP_NAMES.items()}
        for index, name in enumerate(names):
            key = keys.get(name.subgroup, name.subgroup)
            subgroup = (name.subgroup, name.subgroup, singular(name.subgroup), key, key.split(" ", 1)[-1])
            group = (name.group, name.group, *(singular(part) for part in name.group.split(" and ")))
            of_name: dict[str, list[int]] = {}
            for kind, words in zip(KINDS, ((name.label,), name.aliases, name.tags, subgroup, group), strict=True):
                of_name[kind] = []
                for word in words:
                    concept = ids.setdefault(word.lower(), len(ids))
                    if concept == len(self.words):
                        self.words.append(word)
                    owners[concept].add(index)
                    of_name[kind].append(concept)
            self._by_kind.append(of_name)
        self.members = torch.zeros(len(self.words), len(names), dtype=torch.bool)
        for concept, indices in owners.items():
            self.members[concept, list(indices)] = True

    def draw(self, names: Tensor, weights: Sequence[float], generator: torch.Generator) -> list[Caption]:
        """One random caption for each of ``names`` (int64 [B]); ``weights`` are over KINDS.

        A name without aliases or keywords is captioned by its label instead.
        """
        kinds = torch.multinomial(
            torch.tensor(weights, dtype=torch.float32), len(names), replacement=True, generator=generator
        ).tolist()
        picks = torch.rand(len(names), 2, generator=generator, dtype=torch.float64).tolist()
        captions = []
        for name, kind, (which, template) in zip(names.tolist(), kinds, picks, strict=True):
            choices = self._by_kind[name][KINDS[kind]] or self._by_kind[name]["name"]
            concept = choices[int(which * len(choices))]
            text = TEMPLATES[int(template * len(TEMPLATES))].format(self.words[concept])
            captions.append(Caption(text, concept))
        return captions

    def truths(self, captions: Sequence[Caption], names: Tensor) -> Tensor:
        """bool [len(names), len(captions)]: caption j is known to be true of a picture of name i."""
        concepts = torch.tensor([caption.concept for caption in captions])
        return self.members[concepts][:, names].T

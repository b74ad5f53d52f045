"""Label trees: levels over a label set, ancestors, lowest common ancestors, roll-up of scores.

A tree is given as `{"levels": [...], "parents": {child: parent}}` or as lines `child parent`. Levels count from
the leaves: level 0 is the labels themselves, the last level is the coarsest. Depths may be ragged: every node
has the level that its distance from the root gives it, so the nodes of one level never overlap; a label whose
path has no node at a level stands there for itself.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ironclip.errors import TreeError

MAX_NODES = 100_000
MAX_DEPTH = 32


@dataclass(frozen=True)
class LabelTree:
    """A checked tree (or forest), not yet bound to labels.

    Attributes:
        parents: child -> parent.
        levels: names of the levels, leaf level first; empty means they are called "0", "1", ...
        prompts: a node's own prompts, where the templates would not do.
    """

    parents: Mapping[str, str]
    levels: tuple[str, ...] = ()
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, source: object, *, pointer: str = "/tree") -> LabelTree:
        """Read a tree from its JSON form or from text with a line `child parent` for each edge.

        In text, a tab separates names that hold spaces; empty lines and lines that begin with # are passed over.

        Raises:
            TreeError: not of either form, a node with two parents, a cycle, or too large.
        """
        if isinstance(source, str):
            return cls._checked(_parse_lines(source, pointer), (), {}, pointer)
        if not isinstance(source, Mapping) or not isinstance(source.get("parents"), Mapping):
            raise TreeError(
                'A tree is {"levels": [...], "parents": {child: parent}} or text with a line "child parent" per edge.',
                pointer=pointer,
            )
        unknown = sorted(str(key) for key in set(source) - {"levels", "parents", "prompts"})
        if unknown:
            raise TreeError(f"Unknown key in the tree: {unknown[0][:60]!r}.", pointer=pointer)
        parents: dict[str, str] = {}
        for child, parent in source["parents"].items():
            if parent is None:
                continue
            _put(parents, _name(child, pointer), _name(parent, f"{pointer}/parents"), f"{pointer}/parents")
        names = source.get("levels") or ()
        if not isinstance(names, (list, tuple)):
            raise TreeError("`levels` is a list of names, the leaf level first.", pointer=f"{pointer}/levels")
        levels = tuple(_name(name, f"{pointer}/levels") for name in names)
        if len(set(levels)) != len(levels) or any("/" in name for name in levels):
            raise TreeError("Two levels have the same name, or a name has a slash.", pointer=f"{pointer}/levels")
        if len(levels) > MAX_DEPTH:
            raise TreeError(f"At most {MAX_DEPTH} levels are allowed.", pointer=f"{pointer}/levels", limit=MAX_DEPTH)
        return cls._checked(parents, levels, _prompts(source.get("prompts"), pointer), pointer)

    @classmethod
    def _checked(
        cls,
        parents: dict[str, str],
        levels: tuple[str, ...],
        prompts: dict[str, tuple[str, ...]],
        pointer: str,
    ) -> LabelTree:
        if not parents:
            raise TreeError("The tree has no edges.", pointer=f"{pointer}/parents")
        if len(parents) > MAX_NODES:
            raise TreeError(
                f"The tree has {len(parents)} edges, at most {MAX_NODES} are allowed.",
                pointer=pointer,
                limit=MAX_NODES,
            )
        tree = cls(parents, levels, prompts)
        for node in prompts:
            if node not in tree.nodes:
                raise TreeError(
                    f"Prompts are given for {node[:60]!r}, which is not in the tree.", pointer=f"{pointer}/prompts"
                )
        for node in parents:
            depth = len(tree._path(node, pointer))
            if levels and depth > len(levels):
                raise TreeError(
                    f"The path of {node[:60]!r} has {depth} nodes, but only {len(levels)} levels are named.",
                    pointer=f"{pointer}/levels",
                )
        return tree

    def _path(self, node: str, pointer: str = "/tree") -> list[str]:
        path = [node]
        while path[-1] in self.parents:
            path.append(self.parents[path[-1]])
            if len(path) > MAX_DEPTH:
                what = "its own ancestor" if len(set(path)) < len(path) else f"more than {MAX_DEPTH} nodes deep"
                raise TreeError(f"{node[:60]!r} is {what}.", pointer=f"{pointer}/parents")
        return path

    def path(self, node: str) -> list[str]:
        """The node and those above it, up to its root; raises TreeError if it is not in the tree."""
        if node not in self.nodes:
            raise TreeError(f"{node[:60]!r} is not in the tree.")
        return self._path(node)

    def ancestors(self, node: str) -> list[str]:
        """The nodes above `node`, nearest first; raises TreeError if it is not in the tree."""
        return self.path(node)[1:]

    def lca(self, a: str, b: str) -> str | None:
        """Lowest common ancestor; a node counts as its own ancestor. None where their roots differ."""
        above = set(self.path(a))
        return next((node for node in self.path(b) if node in above), None)

    @cached_property
    def nodes(self) -> frozenset[str]:
        """All nodes."""
        return frozenset(self.parents) | frozenset(self.parents.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form."""
        form = {
            "version": 1,
            "levels": list(self.levels),
            "parents": dict(sorted(self.parents.items())),
            "prompts": {node: list(texts) for node, texts in sorted(self.prompts.items())},
        }
        return hashlib.sha256(json.dumps(form, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def bind(self, leaves: Sequence[str], *, pointer: str = "/tree") -> BoundTree:
        """The levels of this tree over the given labels; nodes above none of them are left out.

        Raises:
            TreeError: a label is not in the tree.
        """
        missing = [leaf for leaf in leaves if leaf not in self.nodes]
        if missing:
            shown = ", ".join(repr(leaf[:60]) for leaf in missing[:5])
            raise TreeError(f"{len(missing)} labels are not in the tree: {shown}.", pointer=f"{pointer}/parents")
        paths = [self._path(leaf) for leaf in leaves]
        depth = max(len(path) for path in paths)
        count = max(depth, len(self.levels))
        # Root-aligned: the node at distance r from its root has level count - 1 - r; below it a leaf repeats.
        rows = [[path[max(len(path) - count + level, 0)] for path in paths] for level in range(count)]
        levels = []
        for level, row in enumerate(rows):
            nodes = tuple(dict.fromkeys(row))
            index = {node: i for i, node in enumerate(nodes)}
            name = self.levels[level] if level < len(self.levels) else str(level)
            levels.append(Level(name, nodes, torch.tensor([index[node] for node in row])))
        return BoundTree(self, tuple(leaves), tuple(levels))


@dataclass(frozen=True)
class Level:
    """One level over K labels.

    Attributes:
        name: the level's name.
        nodes: its nodes, in the order of their first label.
        index: label -> node, int64 [K].
    """

    name: str
    nodes: tuple[str, ...]
    index: Tensor

    def rollup(self, logits: Tensor) -> Tensor:
        """Logits of the level whose softmax is the sum of the labels' probabilities.

        Args:
            logits: [..., K]; softmax over K gives the labels' probabilities.

        Returns:
            [..., len(nodes)]: for each node the logsumexp over its labels; differentiable.
        """
        index = self.index.to(logits.device).expand(logits.shape)
        shape = (*logits.shape[:-1], len(self.nodes))
        # The maximum of each node is taken off first, so that a far node does not underflow to log 0.
        top = torch.full(shape, float("-inf"), dtype=logits.dtype, device=logits.device)
        top = top.scatter_reduce(-1, index, logits.detach(), "amax")
        mass = torch.zeros(shape, dtype=logits.dtype, device=logits.device)
        mass = mass.scatter_add(-1, index, (logits - top.gather(-1, index)).exp())
        return mass.log() + top


@dataclass(frozen=True)
class BoundTree:
    """A tree over given labels: its levels from the labels (level 0) up."""

    tree: LabelTree
    leaves: tuple[str, ...]
    levels: tuple[Level, ...]

    @cached_property
    def lca_heights(self) -> Tensor:
        """Height of the lowest common ancestor of each pair of labels: int64 [K, K].

        The height is the first level at which both labels stand under one node: 0 for a label with itself,
        the number of levels where no level joins them (a measure of mistake severity, Bertinetto et al. 2020).
        """
        size = len(self.leaves)
        heights = torch.full((size, size), len(self.levels), dtype=torch.int64)
        for height in range(len(self.levels) - 1, -1, -1):
            index = self.levels[height].index
            heights[index[:, None] == index[None, :]] = height
        heights.fill_diagonal_(0)
        return heights

    def level(self, name: str) -> Level:
        """The level of this name; raises TreeError listing the names."""
        for level in self.levels:
            if level.name == name:
                return level
        raise TreeError(f"The tree has no level {name[:60]!r}; it has {', '.join(lv.name for lv in self.levels)}.")


def _parse_lines(text: str, pointer: str) -> dict[str, str]:
    parents: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part for part in line.split("\t") if part.strip()] if "\t" in line else line.split()
        if len(parts) != 2:
            raise TreeError(
                f"Line {number} of the tree is not `child parent` (use a tab between names that hold spaces).",
                pointer=pointer,
            )
        _put(parents, _name(parts[0], pointer), _name(parts[1], pointer), pointer)
    return parents


def _put(parents: dict[str, str], child: str, parent: str, pointer: str) -> None:
    if parents.get(child, parent) != parent:
        raise TreeError(
            f"{child[:60]!r} has two parents, {parents[child][:60]!r} and {parent[:60]!r}; a tree allows one.",
            pointer=pointer,
        )
    if child == parent:
        raise TreeError(f"{child[:60]!r} is its own parent.", pointer=pointer)
    parents[child] = parent


def _prompts(value: object, pointer: str) -> dict[str, tuple[str, ...]]:
    at = f"{pointer}/prompts"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TreeError("`prompts` is {node: [text, ...]}.", pointer=at)
    result = {}
    for node, texts in value.items():
        if not isinstance(texts, (list, tuple)) or not texts:
            raise TreeError(f"The prompts of {str(node)[:60]!r} are not a list of texts.", pointer=at)
        result[_name(node, at)] = tuple(_name(text, at) for text in texts)
    return result


def _name(value: object, pointer: str) -> str:
    if not isinstance(value, str):
        raise TreeError(f"A name was expected, not {type(value).__name__}.", pointer=pointer)
    name = unicodedata.normalize("NFC", value).strip()
    if not name or len(name) > 1000 or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise TreeError("A name is empty, over 1000 characters, or holds control characters.", pointer=pointer)
    return name

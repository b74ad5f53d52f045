"""The nodes of label trees as tensors: which node each class has at each level, who competes with whom.

Leaves are shared by all trees. A row is one node at one level of one tree; what a row competes with is fixed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.hierarchy import BoundTree, LabelTree


@dataclass(frozen=True)
class Nodes:
    """N nodes and R rows over K classes and T trees.

    Attributes:
        names: of the nodes; the first K are the classes.
        prompts: a node's own prompts where the tree gives them, else empty.
        rows_of: int64 [K, columns], the row of each class in each (tree, level); -1 where a short path repeats a node.
        node_of: int64 [R], the node that a row is about.
        column_of: int64 [R], which (tree, level) a row is in.
        weights: float32 [columns], omega_l / T, with omega_l = 1 - l / (number of levels).
        rivals: bool [R, N], the denominator of a row: its level, and the levels next to it without its own parent and
            children.
        edges: int64 [E, 2], child and parent nodes.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    rows_of: Tensor
    node_of: Tensor
    column_of: Tensor
    weights: Tensor
    rivals: Tensor
    edges: Tensor


def make_nodes(classes: Sequence[str], trees: Sequence[LabelTree], levels: int = 0) -> Nodes:
    """Number the nodes of ``trees`` over ``classes``.

    Args:
        classes: the leaves.
        trees: over all of them; none leaves the classes alone.
        levels: how many levels of each tree to use, the leaves first; 0 uses all.

    Raises:
        TreeError: a class is not in a tree.
    """
    names = list(classes)
    prompts: list[tuple[str, ...]] = [()] * len(names)
    ids = {name: position for position, name in enumerate(names)}
    bound: list[BoundTree | None] = [tree.bind(classes) for tree in trees] or [None]
    columns: list[Tensor] = []  # [K] node of each class
    weights: list[float] = []
    neighbours: list[list[int]] = []  # columns next to each column
    edges: set[tuple[int, int]] = set()
    for tree in bound:
        table = [torch.arange(len(classes))]
        if tree is not None:
            own: dict[str, int] = {}
            for level in tree.levels[1 : levels or None]:
                for node in level.nodes:
                    if node not in ids and node not in own:
                        own[node] = len(names)
                        names.append(node)
                        prompts.append(tree.tree.prompts.get(node, ()))
                table.append(torch.tensor([own.get(node, ids.get(node, -1)) for node in level.nodes])[level.index])
        for child, parent in itertools.pairwise(table):
            edges |= {(int(a), int(b)) for a, b in zip(child, parent, strict=True) if a != b}
        first = len(columns)
        for number, column in enumerate(table):
            neighbours.append([first + n for n in (number - 1, number + 1) if 0 <= n < len(table)])
            weights.append((1 - number / len(table)) / len(bound))
            columns.append(column)
    related = torch.zeros(len(names), len(names), dtype=torch.bool)
    if edges:
        pairs = torch.tensor(sorted(edges))
        related[pairs[:, 0], pairs[:, 1]] = related[pairs[:, 1], pairs[:, 0]] = True
    members = torch.zeros(len(columns), len(names), dtype=torch.bool)
    for number, column in enumerate(columns):
        members[number, column] = True
    rows_of, node_of, column_of, rivals = [], [], [], []
    count = 0
    for number, column in enumerate(columns):
        present, index = torch.unique(column, return_inverse=True)
        around = members[neighbours[number]].any(0) if neighbours[number] else torch.zeros(len(names), dtype=torch.bool)
        rows = index + count
        below = [n for n in neighbours[number] if n < number]
        rows_of.append(rows.masked_fill(column == columns[below[0]], -1) if below else rows)
        node_of.append(present)
        column_of.append(torch.full_like(present, number))
        rivals.append(members[number] | (around & ~related[present]))
        count += len(present)
    return Nodes(
        tuple(names),
        tuple(prompts),
        torch.stack(rows_of, 1),
        torch.cat(node_of),
        torch.cat(column_of),
        torch.tensor(weights),
        torch.cat(rivals),
        torch.tensor(sorted(edges), dtype=torch.int64).reshape(-1, 2),
    )

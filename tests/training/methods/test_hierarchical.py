"""The hierarchical method: its tree as tensors, its loss against a slow reference, and what its training does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ironclip.attacks import PGD, Problem, ThreatModel, WhiteBox, drive
from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.hierarchy import LabelTree
from ironclip.hyperbolic import ball_norm, paired_distances
from ironclip.labels import LabelSet
from tests.conftest import make_tiny_encoder
from training.methods.base import Batch, Networks, Texts
from training.methods.hierarchical import Hierarchical, _plan
from training.methods.hyperbolic_head import HierarchicalHead
from training.methods.nodes import make_nodes
from training.methods.tecoa import TeCoA

# Seven nodes: four leaves, two above them, one root.
LEAVES = ["cat", "dog", "oak", "fern"]
KINDS = {"cat": "animal", "dog": "animal", "oak": "plant", "fern": "plant"}
TREE = {"parents": {**KINDS, "animal": "life", "plant": "life"}}
RAGGED = {"parents": {"cat": "animal", "dog": "animal", "animal": "life", "oak": "life", "fern": "life"}}


def test_the_tree_as_tensors() -> None:
    nodes = make_nodes(LEAVES, [LabelTree.parse(TREE)])
    assert nodes.names == ("cat", "dog", "oak", "fern", "animal", "plant", "life")
    assert nodes.node_of.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert nodes.rows_of.tolist() == [[0, 4, 6], [1, 4, 6], [2, 5, 6], [3, 5, 6]]
    assert nodes.weights.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert {tuple(edge) for edge in nodes.edges.tolist()} == {(0, 4), (1, 4), (2, 5), (3, 5), (4, 6), (5, 6)}
    rivals = [set(torch.nonzero(row).flatten().tolist()) for row in nodes.rivals]
    assert rivals[0] == {0, 1, 2, 3, 5}  # the leaves, and the upper node that is not its parent
    assert rivals[4] == {4, 5, 2, 3}  # its level, and the leaves that are not its children; its parent neither
    assert rivals[6] == {6}  # alone in its level, and both below are its children


def test_short_paths_several_trees_and_fewer_levels() -> None:
    ragged = make_nodes(LEAVES, [LabelTree.parse(RAGGED)])
    # An oak stands for itself below the root: there is no second row for it, nor an edge to itself.
    assert ragged.rows_of[2].tolist()[1] == -1
    assert all(child != parent for child, parent in ragged.edges.tolist())
    both = make_nodes(LEAVES, [LabelTree.parse(TREE), LabelTree.parse({"parents": dict.fromkeys(LEAVES, "thing")})])
    assert both.rows_of.shape == (4, 5)
    assert both.weights.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6, 1 / 2, 1 / 4])
    assert make_nodes(LEAVES, [LabelTree.parse(TREE)], levels=1).rows_of.shape == (4, 1)
    assert make_nodes(LEAVES, []).rivals.all()


class World:
    """A method, its head around a tiny encoder, and a batch."""

    def __init__(self, tmp_path: Path, labels: list[int], tree: Any = TREE, **options: Any) -> None:
        trees: tuple[str, ...] = ()
        if tree is not None:
            (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
            trees = (str(tmp_path / "tree.json"),)
        self.method = Hierarchical(trees=trees, **options)
        self.encoder: Encoder = make_tiny_encoder()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(len(labels), 3, 32, 32, generator=generator)
        self.labels = torch.tensor(labels)
        label_set = LabelSet.parse(LEAVES).resolve(self.encoder)
        features = self.encoder.encode_image(self.images).detach()
        self.head: HierarchicalHead = self.method.extra(self.encoder, label_set, lambda: (features, self.labels))
        weights = nn.functional.normalize(self.encoder.encode_text([f"a photo of a {n}." for n in LEAVES]), dim=-1)
        texts = Texts(weights.detach(), self.encoder.logit_scale.item())
        tower = self.encoder.encode_image
        self.networks = Networks(tower, texts, tower, extra=self.head)
        self.batch = Batch(self.images, self.labels, self.images.new_zeros(len(labels), 0))


def _ball(tangent: Tensor, r: float) -> Tensor:
    length = tangent.norm(dim=-1, keepdim=True)
    return torch.tanh(math.sqrt(r) * length) * tangent / (math.sqrt(r) * length)


def _midpoint(points: Tensor, r: float) -> Tensor:
    klein = 2 * points / (1 + r * points.square().sum(-1, keepdim=True))
    gamma = 1 / torch.sqrt(1 - r * klein.square().sum(-1, keepdim=True))
    mean = (gamma * klein).sum(0) / gamma.sum(0)
    return mean / (1 + torch.sqrt(1 - r * mean.square().sum()))


def _distance(u: Tensor, v: Tensor, r: float) -> Tensor:
    rim = (1 - r * u.square().sum(-1)) * (1 - r * v.square().sum(-1))
    return torch.arccosh(1 + 2 * r * (u - v).square().sum(-1) / rim) / math.sqrt(r)


def test_the_loss_is_the_formula(tmp_path: Path) -> None:
    r = 0.6
    world = World(tmp_path, [0, 0, 1, 2], curvature=r, violation_quantile=0.3)
    head = world.head
    found = world.method.loss(world.networks, world.batch, world.images)
    with torch.no_grad():
        texts = _ball(head.log_text_scale.exp() * head.pooled @ head.projection, r)
        pictures = _ball(head.log_image_scale.exp() * world.encoder.encode_image(world.images), r)
        temperature = head.temperature()
        members = {0: [0, 1], 1: [2], 2: [3], 4: [0, 1, 2], 5: [3], 6: [0, 1, 2, 3]}
        rivals = {0: [0, 1, 2, 3, 5], 1: [0, 1, 2, 3, 5], 2: [0, 1, 2, 3, 4], 4: [4, 5, 2, 3], 5: [4, 5, 0, 1], 6: [6]}
        levels = {0: [0, 1, 2], 1: [4, 5], 2: [6]}
        alignment, intra = torch.zeros(()), []
        for level, present in levels.items():
            for node in present:
                middle = _midpoint(pictures[members[node]], r)
                logits = -temperature * _distance(middle, texts[rivals[node]], r)
                own = rivals[node].index(node)
                alignment += (1 - level / 3) / len(present) * -logits.log_softmax(0)[own]
                intra.append(torch.relu(texts[node].norm() - middle.norm() + 0.05))
        matched = _distance(pictures, texts[world.labels], r)
        violation = torch.relu(matched - torch.quantile(matched, 0.3)).mean()
        pairs = [(0, 4), (1, 4), (2, 5), (3, 5), (4, 6), (5, 6)]
        gaps = torch.stack([torch.relu(texts[p].norm() - texts[c].norm() + 0.05) for c, p in pairs]).mean()
    deeper = torch.stack(intra).mean()
    expected = {"alignment": alignment, "violation": violation, "label_gap": gaps, "intra_gap": deeper}
    for name, value in expected.items():
        assert found.parts[name].item() == pytest.approx(value.item(), rel=2e-3, abs=1e-4), name
    total = alignment + 0.1 * violation + gaps + deeper
    assert found.total.item() == pytest.approx(total.item(), rel=2e-3)


def test_leaves_alone_on_the_sphere_are_tecoa(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 1, 2, 3], tree=None, space="cosine")
    ours = world.method.loss(world.networks, world.batch, world.images).total
    theirs = TeCoA().loss(world.networks, world.batch, world.images).total
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    weights = list(world.encoder.model.visual.parameters())  # type: ignore[union-attr]
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_one_perturbation_raises_the_loss_of_every_level(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 0, 1, 2, 3, 3])
    objective = world.method.objective(world.networks, world.batch)
    items = torch.arange(6)
    with torch.no_grad():
        shared = objective(world.encoder.encode_image(world.images), items).sum()
    whole = world.method.loss(world.networks, world.batch, world.images).parts["alignment"]
    assert shared.item() == pytest.approx(whole.item(), rel=1e-4)  # shares of a node's loss add up to it
    problem = Problem(
        world.images, ThreatModel("linf", 8 / 255), objective, lambda o, i: torch.zeros(len(i), dtype=torch.bool), items
    )
    attack = PGD(iterations=8, keep="last", stop_fooled=False)
    moved = drive(attack, problem, WhiteBox(world.encoder.encode_image, problem), keep_fooled=False).images

    def by_level(images: Tensor) -> Tensor:
        head = world.head
        with torch.no_grad():
            points = head.images(world.encoder.encode_image(images))
            plan = _plan(head, world.labels)
            losses, _ = world.method._terms(head, points, plan, head.texts(), head.temperature())
        return torch.zeros(3).index_add(0, head.column_of[plan.there], losses)

    clean, adversarial = by_level(world.images), by_level(moved)
    assert (adversarial[:2] > clean[:2]).all()  # the root has no rival


@pytest.mark.parametrize("kind", ["feature", "token"])
def test_the_text_side_moves_against_the_loss_and_stays_in_its_ball(kind: str, tmp_path: Path) -> None:
    plain, attacked = World(tmp_path, [0, 1, 2]), World(tmp_path, [0, 1, 2], text_attack=kind, text_eps=2e-3)
    before = plain.method.loss(plain.networks, plain.batch, plain.images)
    after = attacked.method.loss(attacked.networks, attacked.batch, attacked.images)
    assert after.parts["alignment"] > before.parts["alignment"]
    head = attacked.head
    plan = _plan(head, attacked.labels)
    points = head.images(attacked.encoder.encode_image(attacked.images)).detach()
    shift = attacked.method._text_shift(head, points, plan)
    assert shift is not None
    untouched = torch.ones(len(shift), dtype=torch.bool)
    untouched[plan.nodes] = False
    assert (shift[untouched] == 0).all()
    untouched[-1] = True  # the root has no rival, so nothing can be gained there
    assert (shift[~untouched].abs().sum(1) > 0).all()
    if kind == "feature":
        assert shift.abs().max() <= 2e-3 * head.relative * 1.0001


def test_training_orders_the_norms_by_depth_and_the_head_is_what_classifies(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 1, 2, 3])
    world.encoder.requires_grad_(False)
    optimiser = torch.optim.Adam(world.head.parameters(), lr=2e-2)
    for _ in range(150):
        optimiser.zero_grad()
        torch.autograd.backward(world.method.loss(world.networks, world.batch, world.images).total)
        optimiser.step()
    with torch.no_grad():
        texts = world.head.texts()
        depths = ball_norm(texts, 1.0)
        edges = world.head.edges
        assert (depths[edges[:, 1]] < depths[edges[:, 0]]).all()
        points = world.head.images(world.encoder.encode_image(world.images))
        expected = torch.stack([paired_distances(points, text.expand_as(points), 1.0) for text in texts[:4]], 1)
    world.method.apply(world.encoder, world.head)
    found = Classifier(world.encoder, LabelSet.parse(LEAVES))(world.images)
    torch.testing.assert_close(found, -world.head.temperature().detach() * expected, atol=2e-3, rtol=2e-3)


def test_mistakes_are_named() -> None:
    with pytest.raises(OptionError, match="there is no tree 'nowhere"):
        Hierarchical(trees=("nowhere.json",)).extra(
            make_tiny_encoder(), LabelSet.parse(LEAVES), lambda: (torch.ones(1, 32), torch.tensor([0]))
        )
    with pytest.raises(OptionError, match="curvature is above 0"):
        Hierarchical(curvature=0.0)

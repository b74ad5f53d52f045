"""Classifier: pixels in [0,1] -> logits, through encoder, head, label set and defence. Nothing else decides.

The trainer evaluates it, attacks go through it, the service answers from it. It is differentiable from the
pixels to the logits of every level.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ironclip.defences import Defence, make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError, TooManyLabels
from ironclip.head import Head
from ironclip.hierarchy import LabelTree, Level
from ironclip.hyperbolic import distances, exp0
from ironclip.labels import Label, LabelSet
from ironclip.textbank import TextBank, build_text_bank

LevelMode = Literal["rollup", "prompts"]
LEVEL_MODES: tuple[LevelMode, ...] = ("rollup", "prompts")


@dataclass(frozen=True)
class Decision:
    """Everything that a Classifier says of N pictures.

    Attributes:
        logits: float32 [N, K]; their softmax is the answer's scores.
        cosine: float32 [N, K]: cosine of the picture's first view with each label's weights.
        levels: name of a level -> its logits, float32 [N, nodes]; empty without a tree.
    """

    logits: Tensor
    cosine: Tensor
    levels: dict[str, Tensor]


class Classifier(nn.Module):
    """One encoder deciding among one label set.

    Args:
        encoder: in any dtype; not modified.
        label_set: resolved with the encoder's templates here.
        bank: its text bank, if already built, of this encoder and label set (with descriptions, if the defence
            wants them).
        tree: a label tree over the labels, or several by name.
        levels: how a tree's upper levels are scored: `rollup` sums the labels' probabilities, `prompts` lets
            every node compete by its own prompts.
        level_banks: text banks of the upper levels, if already built; only with `prompts`.
        defence: DEFENCES["none"] if not given.

    Raises:
        LabelError, TreeError, OptionError: as their modules say.
        ValueError: a bank of another encoder or label set.
    """

    def __init__(
        self,
        encoder: Encoder,
        label_set: LabelSet,
        bank: TextBank | None = None,
        *,
        tree: LabelTree | Mapping[str, LabelTree] | None = None,
        levels: LevelMode = "rollup",
        level_banks: Mapping[str, TextBank] | None = None,
        defence: Defence | None = None,
    ) -> None:
        super().__init__()
        if levels not in LEVEL_MODES:
            raise OptionError(
                f"levels is one of {', '.join(LEVEL_MODES)}, not {str(levels)[:40]!r}.", pointer="/levels"
            )
        self.encoder = encoder
        self.label_set = label_set.resolve(encoder)
        self.defence = defence or make_defence()
        if encoder.head.type not in self.defence.heads:
            raise OptionError(
                f"The defence {self.defence.name!r} does not serve encoders with a {encoder.head.type} head.",
                pointer="/defence",
            )
        self.bank = self._own(bank, self.label_set)
        self.level_mode: LevelMode = levels
        self.tree = tree
        self.levels = bind_levels(tree, self.label_set) if tree is not None else {}
        self.level_banks: dict[str, TextBank] = {}
        if levels == "prompts":
            given = level_banks or {}
            for name, level_set in level_label_sets(tree, self.label_set).items():
                self.level_banks[name] = self._own(given.get(name), level_set.resolve(encoder))
        self._rule = NativeRule(encoder)
        self._state: Any = self.defence.prepare(self.bank)
        self._level_states = {name: self.defence.prepare(level) for name, level in self.level_banks.items()}

    def _own(self, bank: TextBank | None, label_set: LabelSet) -> TextBank:
        """The given bank, if it is of this encoder and these labels; else a new one."""
        descriptions = self.defence.reads_descriptions
        if bank is None:
            bank = build_text_bank(self.encoder, label_set, descriptions=descriptions)
        made_for = (bank.encoder, bank.label_set)
        if made_for != (self.encoder.digest, label_set.digest) or (descriptions and not bank.descriptions):
            raise ValueError("the text bank was built for another encoder or label set, or without descriptions")
        return bank.to(self.encoder.device)

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.label_set.names

    @property
    def label_bytes(self) -> int:
        """Memory of all that was made of the labels: text banks, and what the defence prepared of them."""
        banks = [self.bank, *self.level_banks.values()]
        held = [value for bank in banks for value in vars(bank).values() if isinstance(value, Tensor)]
        for state in (self._state, *self._level_states.values()):
            held += state.tensors() if hasattr(state, "tensors") else []
        # A state may point to a bank's own memory.
        return sum({value.data_ptr(): value.nbytes for value in held}.values())

    def reseeded(self, seed: int) -> Classifier:
        """The same decision with other draws of the defence; shares everything with this one."""
        return self._with(self.defence.reseeded(seed))

    def under(self, defence: Defence) -> Classifier:
        """The same decision under a defence that prepares the labels alike; shares everything with this one.

        Raises:
            ValueError: the defence prepares them otherwise.
        """
        if defence == self.defence:
            return self
        if defence.preparation() != self.defence.preparation():
            raise ValueError("the defence prepares the labels otherwise")
        return self._with(defence)

    def _with(self, defence: Defence) -> Classifier:
        other = copy.copy(self)
        other.defence = defence
        return other

    def over(self, encoder: Encoder) -> Classifier:
        """The same decision over another form of its encoder (another dtype); all that was made of the labels is
        shared, or moved where that one's device is another.

        Raises:
            ValueError: another encoder.
        """
        if encoder.digest == self.encoder.digest and encoder.device == self.encoder.device:
            other = copy.copy(self)
            other._modules = dict(self._modules)
            other.encoder, other._rule = encoder, NativeRule(encoder)
            return other
        return Classifier(
            encoder,
            self.label_set,
            self.bank,
            tree=self.tree,
            levels=self.level_mode,
            level_banks=self.level_banks,
            defence=self.defence,
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of every view: [N, 3, R, R] in [0,1] -> float32 [N, views, dim], not normalised."""
        views = self.defence.make_views(pixels, self.encoder.encode_image)
        features = self.encoder.encode_image(views.flatten(0, 1))
        return features.reshape(*views.shape[:2], -1)

    def decide(self, features: Tensor) -> Tensor:
        """Logits of the labels: features [N, views, dim] (or [N, dim] for one view) -> float32 [N, K]."""
        return self.defence.logits(_with_views(features), self.bank, self._state, self._rule)

    def judge(self, features: Tensor) -> Decision:
        """Logits, cosines and the logits of every level, from features as for `decide`."""
        features = _with_views(features)
        logits = self.decide(features)
        cosine = normalize(features[:, 0], dim=-1) @ self.bank.weights.T
        return Decision(logits, cosine, self.level_logits(features, logits))

    def level_logits(self, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Logits of every level of the tree(s), the leaf level included: name -> [N, nodes]."""
        return {name: self.level_of(features, name, logits) for name in self.levels}

    def level_of(self, features: Tensor, name: str, logits: Tensor | None = None) -> Tensor:
        """Logits of one level of the tree(s), [N, nodes]; ``logits`` of the labels where they are known already."""
        if name in self.level_banks:
            bank, state = self.level_banks[name], self._level_states[name]
            return self.defence.logits(_with_views(features), bank, state, self._rule)
        return self.levels[name].rollup(self.decide(features) if logits is None else logits)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] in [0,1] -> logits [N, K]."""
        return self.decide(self.encode(pixels))

    def vectors(self, features: Tensor) -> Tensor:
        """What the defence makes of the views' features [N, views, dim]: unit vectors, [N, dim]."""
        return self.defence.vector(_with_views(features), self.bank, self._state, self._rule)


@dataclass(frozen=True)
class NativeRule:
    """The encoder's own rule, see `ironclip.encoder.Head`: features [..., dim] and a bank -> logits [..., K]."""

    encoder: Encoder

    @property
    def scale(self) -> Tensor:
        """What a cosine head multiplies cosines with."""
        return self.encoder.logit_scale

    def __call__(self, features: Tensor, bank: TextBank) -> Tensor:
        """Logits of the labels."""
        head = self.encoder.head
        if head.type == "poincare":
            texts = text_points(head, bank)
            images = exp0(head.image_scale * features, head.curvature)
            return -head.temperature * distances(images, texts, head.curvature)
        return self.encoder.logit_scale * (normalize(features, dim=-1) @ bank.weights.T)


def text_points(head: Head, bank: TextBank) -> Tensor:
    """Where a hyperbolic head puts a bank's labels: points s [K, dim], see `ironclip.hyperbolic`."""
    return exp0(head.text_scale * bank.norms[:, None] * bank.weights, head.curvature)


def bind_levels(tree: LabelTree | Mapping[str, LabelTree], label_set: LabelSet) -> dict[str, Level]:
    """The levels of a tree over a label set by name, leaves first; with several trees `tree/level`."""
    if isinstance(tree, LabelTree):
        return {level.name: level for level in tree.bind(label_set.names).levels}
    levels = {}
    for name, one in tree.items():
        for level in one.bind(label_set.names, pointer=f"/tree/{name}").levels:
            levels[f"{name}/{level.name}"] = level
    return levels


def level_label_sets(tree: LabelTree | Mapping[str, LabelTree] | None, label_set: LabelSet) -> dict[str, LabelSet]:
    """For levels scored by their own prompts: each level above the labels as a label set of its nodes.

    A node's prompts are those the tree gives it, else the label set's templates with its name; a label that
    stands for itself at an upper level keeps its own prompts.

    Raises:
        TooManyLabels: the levels make more prompts together than one label set may.
    """
    if tree is None:
        return {}
    labels = {label.name: label for label in label_set.labels}
    trees = {"": tree} if isinstance(tree, LabelTree) else tree
    result = {}
    total, per_node, limits = 0, max(len(label_set.templates), 1), label_set.limits
    for prefix, one in trees.items():
        for level in one.bind(label_set.names).levels[1:]:
            nodes = tuple(
                Label(node, one.prompts[node]) if node in one.prompts else labels.get(node, Label(node))
                for node in level.nodes
            )
            # Each level alone may be within the limit: what counts is what has to be encoded for one answer.
            total += sum((len(node.prompts) or per_node) + len(node.descriptions) for node in nodes)
            if total > limits.texts:
                raise TooManyLabels(
                    f"The upper levels of the label tree make over {limits.texts} prompts and descriptions together, "
                    f"at most {limits.texts} are allowed. Use fewer templates, or levels: rollup.",
                    pointer="/tree",
                    limit=limits.texts,
                )
            name = f"{prefix}/{level.name}" if prefix else level.name
            result[name] = LabelSet(nodes, label_set.templates, limits)
    return result


def _with_views(features: Tensor) -> Tensor:
    return features[:, None] if features.ndim == 2 else features


@torch.no_grad()
def predict(classifier: Classifier, pixels: Tensor, *, batch_size: int = 256) -> Decision:
    """Decide for many pictures in batches, without gradients.

    Args:
        classifier: what decides.
        pixels: uint8 or float RGB, [N, 3, R, R]; uint8 is divided by 255.
        batch_size: pictures per forward.

    Returns:
        The decision, on the device that ``pixels`` are on.
    """
    parts = []
    for batch in torch.split(pixels, batch_size):
        batch = batch.to(classifier.encoder.device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        parts.append(classifier.judge(classifier.encode(batch)))

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat(values).to(pixels.device)

    return Decision(
        joined([part.logits for part in parts]),
        joined([part.cosine for part in parts]),
        {name: joined([part.levels[name] for part in parts]) for name in parts[0].levels},
    )

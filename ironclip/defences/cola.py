"""COLA: cross-modality alignment at test time by subspace projection and optimal transport (arXiv 2510.24038).

No code of the paper's is public. Formulas are those of its text (equations are named); where it is silent or
contradicts itself the choice is ours and mostly an option: the sign of equation 6 (its prose: lower entropy, higher
weight), temperatures, the law of the crops, the solver. The paper evaluates it by attacks on the undefended encoder;
here attacks go through it, since all of it is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.defences.contract import Encode, HeadRule, check_choice, check_number
from ironclip.defences.crops import crops
from ironclip.defences.transport import COUPLINGS, MIDDLE, Coupling, kernel_cost, transport_cost
from ironclip.errors import OptionError
from ironclip.textbank import TextBank

# Elements of one cost tensor at most while deciding without gradients, on a CPU and elsewhere: a CPU's cache holds few.
_CHUNK = 1 << 19
# The exact coupling is one linear program a label and picture, half a millisecond each.
_MOST_EXACT = 2000
_LEAST_EPSILON = 0.05
_GPU_CHUNK = 1 << 26
# Pictures decided together at most without gradients.
_MOST_PICTURES = 64
_MOST_RAISED = 80.0
# Labels whose numbers of texts differ by less than this share are laid out together, the shorter filled up.
_ALIKE = 1.25


@dataclass(frozen=True)
class Group:
    """Labels with about as many texts, laid out label by label, M texts each.

    Attributes:
        labels: int64 [k], which they are.
        texts: unit features of the texts, float32 [k M, dim]; zeros where a label has fewer.
        projected: the same in the subspace's basis, [k M, C]; `texts` itself without a projection.
        mask: bool [k, M], which are there.
        full: whether all are.
    """

    labels: Tensor
    texts: Tensor
    projected: Tensor
    mask: Tensor
    full: bool

    def block(self, start: int, stop: int) -> Group:
        """Those of its labels from ``start`` to ``stop``, the same memory."""
        width = self.mask.shape[1]
        rows, some = slice(start * width, stop * width), slice(start, stop)
        return Group(self.labels[some], self.texts[rows], self.projected[rows], self.mask[some], self.full)

    def by_label(self, values: Tensor) -> Tensor:
        """[..., k M] -> [..., k, M]."""
        return values.reshape(*values.shape[:-1], *self.mask.shape)


@dataclass(frozen=True)
class Bank:
    """What COLA keeps of a text bank.

    Attributes:
        groups: all labels' texts, labels with as many together.
        order: int64 [K], where each label stands in the groups one after the other; None where all are in order.
        basis: U_C of equation 3, [dim, C]; None without a projection.
        centres: mean of each label's texts, [K, dim] (z-bar of equation 6).
    """

    groups: tuple[Group, ...]
    order: Tensor | None
    basis: Tensor | None
    centres: Tensor

    def tensors(self) -> list[Tensor]:
        """All that takes memory; texts may be those of the text bank."""
        parts = [value for one in self.groups for value in (one.texts, one.projected, one.mask)]
        return [*parts, self.centres, *([] if self.basis is None else [self.basis])]

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What was found for the groups' labels, [B, k] each, as [B, K]."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        return whole if self.order is None else whole.index_select(1, self.order)


@dataclass(frozen=True)
class Cola:
    """The defence; options as fields.

    Attributes:
        views: N, the picture and N-1 random crops of it.
        texts: M, texts of a label at most: its prompts, then its descriptions.
        projection: `subspace` (equation 4), or `none`, to see what it does.
        rank: C, dimensions of the subspace; 0 takes half the encoder's (256 of ViT-B/32's 512, as in the paper).
        weights: of views and texts: `entropy` (equation 6), or `uniform`.
        temperature: of the entropy weights.
        coupling: of views and texts: `sinkhorn`, `product` or `exact`, see `transport_cost`.
        epsilon, iterations: of `sinkhorn`.
        smallest_crop: least share of the picture's area in a crop.
        calibrated: multiply the logits by the mean length of the projected unit features, which the cosine of equation
            8 divides by. No decision changes, but without it a softmax over few labels is falsely sure. The paper has
            no such factor.
        seed: of the crops.
    """

    views: int = 5
    texts: int = 50
    projection: Literal["subspace", "none"] = "subspace"
    rank: int = 0
    weights: Literal["entropy", "uniform"] = "entropy"
    temperature: float = 0.5
    coupling: Coupling = "sinkhorn"
    epsilon: float = 0.1
    iterations: int = 10
    smallest_crop: float = 0.5
    calibrated: bool = True
    seed: int = 0

    name: ClassVar[str] = "cola"
    optimising: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    reads_descriptions: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ("cosine",)

    def __post_init__(self) -> None:
        check_number("views", self.views, 1, 256, whole=True)
        check_number("texts", self.texts, 1, 1000, whole=True)
        check_number("rank", self.rank, 0, 1 << 16, whole=True)
        check_number("iterations", self.iterations, 1, 1000, whole=True)
        check_number("seed", self.seed, 0, (1 << 53) - 1, whole=True)
        check_number("temperature", self.temperature, 1e-3, 1e6)
        check_number("epsilon", self.epsilon, _LEAST_EPSILON, 1e3)
        check_number("smallest_crop", self.smallest_crop, 0.01, 1.0)
        check_choice("projection", self.projection, ("subspace", "none"))
        check_choice("weights", self.weights, ("entropy", "uniform"))
        check_choice("coupling", self.coupling, COUPLINGS)
        if not isinstance(self.calibrated, bool):
            raise OptionError("calibrated is true or false.", pointer="/defence/calibrated")

    @property
    def random(self) -> bool:
        """With more than one view."""
        return self.views > 1

    @property
    def view_count(self) -> int:
        """N."""
        return self.views

    @property
    def cost(self) -> int:
        """N forwards; what comes after them is small beside them."""
        return self.views

    def comparisons(self, labels: int, longest: int) -> int:
        """Views times texts, for every look at the costs; labels with few texts cost as much as the one with most."""
        looks = {"sinkhorn": self.iterations, "product": 1, "exact": 2000}[self.coupling]
        return self.views * labels * min(longest, self.texts) * looks

    def options(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def reseeded(self, seed: int) -> Cola:
        """The same with other crops."""
        return replace(self, seed=seed)

    def preparation(self) -> Cola:
        """Texts and subspace; the exact coupling has a limit of its own."""
        coupling: Coupling = "exact" if self.coupling == "exact" else "sinkhorn"
        return Cola(texts=self.texts, projection=self.projection, rank=self.rank, coupling=coupling)

    def make_views(self, pixels: Tensor, encode: Encode) -> Tensor:
        """[N, 3, R, R] -> [N, views, 3, R, R]: the picture itself, then its crops."""
        return crops(pixels, self.views, smallest=self.smallest_crop, seed=self.seed)

    def prepare(self, bank: TextBank) -> Bank:
        """The text bank's uncentred subspace (equation 3) and all that depends on the bank alone.

        Raises:
            OptionError: too many labels for the exact coupling.
        """
        if self.coupling == "exact" and len(bank.counts) > _MOST_EXACT:
            raise OptionError(
                f"The exact coupling solves a linear program for each label: at most {_MOST_EXACT} of them, not "
                f"{len(bank.counts)}. Use the sinkhorn coupling.",
                pointer="/defence/coupling",
                limit=_MOST_EXACT,
            )
        with torch.inference_mode(False), torch.no_grad():
            lengths = bank.counts.sum(1).clamp_max(self.texts)
            used, label = _used(bank, lengths)
            texts, whole = bank.texts, len(lengths)
            centres = texts.new_zeros(whole, texts.shape[1]).index_add_(0, label, texts[used])
            centres /= lengths[:, None]
            basis = None
            if self.projection == "subspace":
                # Every text of every label counts once (a text of two labels twice), as Z of equation 3 has them.
                counts = torch.bincount(used, minlength=len(texts))
                basis = subspace(texts * counts.sqrt()[:, None], self.rank or texts.shape[1] // 2)
            groups = tuple(_group(bank, lengths, labels, basis) for labels in _alike(lengths))
            places = torch.cat([group.labels for group in groups])
            order = None if torch.equal(places, torch.arange(whole, device=places.device)) else places.argsort()
        return Bank(groups, order, basis, centres)

    def logits(self, features: Tensor, bank: TextBank, state: Bank, head: HeadRule) -> Tensor:
        """[N, views, dim] -> [N, K]: tau (1 - d), d the transport cost of equation 7."""
        size = _MOST_PICTURES
        if torch.is_grad_enabled() and features.requires_grad:
            size = max(1, len(features))
        return torch.cat([self._logits(part, state, head.scale) for part in torch.split(features, size)])

    def _logits(self, features: Tensor, state: Bank, scale: Tensor) -> Tensor:
        views = normalize(features, dim=-1)
        near = scale * (views @ state.centres.T)
        a = self._view_weights(near)
        projected = views if state.basis is None else views @ state.basis
        lengths = projected.norm(dim=-1)
        directions = projected / lengths.clamp_min(1e-12)[..., None]
        distances, rest = [], Rest.of(near[:, 0]) if self.weights == "entropy" else None
        for group in self._blocks(state, features):
            b = self._text_weights(views[:, 0], rest, group, scale)
            distances.append(self._distance(directions, a, b, group))
        factor = scale * (a * lengths).sum(1, keepdim=True) if self.calibrated else scale
        logits: Tensor = factor * (1 - state.in_order(distances))
        return logits

    def _blocks(self, state: Bank, features: Tensor) -> Iterator[Group]:
        """The groups, cut so that what is made of a part fits into the cache: texts are read once for all pictures."""
        chunk = _CHUNK if features.device.type == "cpu" else _GPU_CHUNK
        for group in state.groups:
            labels, texts = group.mask.shape
            step = max(1, chunk // (len(features) * self.views * texts))
            for start in range(0, labels, step):
                yield group if step >= labels else group.block(start, start + step)

    def _distance(self, directions: Tensor, a: Tensor, b: Tensor, group: Group) -> Tensor:
        """Transport cost [B, K] from unit views [B, N, C] to the labels' texts."""
        if self.coupling == "product":
            # By bilinearity one mean view does for all: N times less work than the costs.
            mean = (a[..., None] * directions).sum(1)
            near: Tensor = torch.linalg.vecdot(group.by_label(mean @ group.projected.T), b)
            return 1 - near
        if self.coupling == "sinkhorn" and not torch.is_grad_enabled():
            return kernel_cost(self._kernel(directions, group), a, b, self.epsilon, self.iterations)
        cost = 1 - group.by_label(directions @ group.projected.T)
        return transport_cost(cost, a, b, self.coupling, epsilon=self.epsilon, iterations=self.iterations)

    def _kernel(self, directions: Tensor, group: Group) -> Tensor:
        """Sinkhorn's kernel right out of the product of views and texts, [B, N, K, M]: the costs are never written."""
        offset = directions.new_full((1,), (MIDDLE - 1) / self.epsilon)
        logs = torch.addmm(offset, directions.flatten(0, 1), group.projected.T, alpha=1 / self.epsilon)
        return group.by_label(logs.exp_().view(*directions.shape[:2], -1))

    def vector(self, features: Tensor, bank: TextBank | None, state: Bank, head: HeadRule) -> Tensor:
        """[N, views, dim] -> [N, dim]: the weighted mean of the projected views, at length 1."""
        views = normalize(features, dim=-1)
        mean = (self._view_weights(head.scale * (views @ state.centres.T))[..., None] * views).sum(1)
        return normalize(mean if state.basis is None else mean @ state.basis @ state.basis.T, dim=-1)

    def _view_weights(self, near: Tensor) -> Tensor:
        """a of equation 6 from logits [B, N, K] of the raw views: surer views weigh more."""
        if self.weights == "uniform":
            return torch.full_like(near[..., 0], 1 / near.shape[1])
        logs = near.log_softmax(-1)
        return ((logs.exp() * logs).sum(-1) / self.temperature).softmax(-1)

    def _text_weights(self, first: Tensor, rest: Rest | None, group: Group, scale: Tensor) -> Tensor:
        """b of equation 6 ("computed analogously"), [B, K, M]: a text weighs more, the surer it makes the picture."""
        if rest is None:
            share: Tensor = group.mask / group.mask.sum(-1, keepdim=True)
            return share.expand(len(first), -1, -1)
        own = group.by_label((scale * first) @ group.texts.T)
        heights = rest.entropies(own, group.labels).mul_(-1 / self.temperature)
        if not group.full:
            heights = heights.masked_fill(~group.mask, -torch.inf)
        return heights.softmax(-1)


def subspace(texts: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of the texts as columns, uncentred (equation 3).

    Args:
        texts: [T, dim].
        rank: how many; fewer where the texts span fewer.

    Returns:
        float32 [dim, C]. From the dim x dim Gram matrix in float64: its size does not grow with the texts. Signs and
        bases of equal values are open, the projector is not.
    """
    exact = texts.double()
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    spanned = int((values > values[-1] * 1e-10).sum())
    leading: Tensor = vectors.flip(1)[:, : min(rank, spanned)]
    return leading.to(texts.dtype).contiguous()


@dataclass(frozen=True)
class Rest:
    """What the other labels bring to a softmax when one label's logit is replaced.

    Attributes:
        top: the largest logit, [B, 1].
        others: sum of the exponentials of all others, less ``top``, for each label, [B, K].
        moments: the same, each times its logit less ``top``.
    """

    top: Tensor
    others: Tensor
    moments: Tensor

    @classmethod
    def of(cls, near: Tensor) -> Rest:
        """From the logits of the labels' centres, [B, K]."""
        top, best = near.max(-1, keepdim=True)
        shifted = near - top
        weights = shifted.exp()
        others = weights.sum(-1, keepdim=True) - weights
        # The best label's own weight is 1 of the sum: what is left must not be had by a subtraction.
        others = others.scatter(-1, best, weights.scatter(-1, best, 0.0).sum(-1, keepdim=True))
        return cls(top, others.clamp_min(0), (weights * shifted).sum(-1, keepdim=True) - weights * shifted)

    def entropies(self, own: Tensor, labels: Tensor) -> Tensor:
        """Entropy of the labels' softmax when one label's logit is that of one of its texts instead.

        Args:
            own: [B, k, M], logits of the texts of some labels.
            labels: int64 [k], which of the K those are.

        Returns:
            [B, k, M]. Each is an update of rank one, O(KM) in all instead of O(K^2 M).
        """
        others, moments = self.others[:, labels, None], self.moments[:, labels, None]
        # A text nearer than the best label's centre by more than this is as sure as can be, and e^80 is a float32.
        raised = (own - self.top[..., None]).clamp_max(_MOST_RAISED)
        weight = raised.exp()
        total = weight + others
        return total.log() - torch.addcmul(moments, weight, raised) / total


def _used(bank: TextBank, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``lengths`` texts of all labels, as positions in the bank's, and whose they are: int64 [T] each."""
    counts = bank.counts.sum(1)
    label = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    place = torch.arange(len(label), device=counts.device) - (counts.cumsum(0) - counts)[label]
    first = place < lengths[label]
    return bank.rows[first], label[first]


def _alike(lengths: Tensor) -> list[Tensor]:
    """Labels with about as many texts together, each group in order: int64 [k] each."""
    known, groups = lengths.tolist(), []
    bound = 0.0
    for width in sorted(set(known)):
        if width > bound:
            groups.append([width, width])
            bound = width * _ALIKE
        groups[-1][1] = width
    return [((lengths >= low) & (lengths <= high)).nonzero()[:, 0] for low, high in groups]


def _group(bank: TextBank, lengths: Tensor, labels: Tensor, basis: Tensor | None) -> Group:
    counts = bank.counts.sum(1)
    starts = counts.cumsum(0) - counts
    place = torch.arange(int(lengths[labels].max()), device=labels.device)
    mask = place < lengths[labels][:, None]
    rows = bank.rows[(starts[labels][:, None] + place).clamp_max(len(bank.rows) - 1)]
    full, laid = bool(mask.all()), rows.flatten()
    if full and len(laid) == len(bank.texts) and bool((laid == torch.arange(len(laid), device=laid.device)).all()):
        texts = bank.texts  # they stand there as they are wanted: no second copy
    else:
        texts = torch.where(mask[..., None], bank.texts[rows], 0.0).flatten(0, 1)
    return Group(labels, texts, texts if basis is None else texts @ basis, mask, full)

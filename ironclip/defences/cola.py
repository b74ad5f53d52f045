"""COLA: cross-modality alignment at test time by subspace projection and optimal transport (arXiv 2510.24038).

No code of the paper's is public. Formulas are those of its text (equations are named); where it is silent or
contradicts itself the choice is ours and mostly an option: the sign of equation 6 (its prose: lower entropy, higher
weight), temperatures, the law of the crops, the solver. The paper evaluates it by attacks on the undefended encoder;
here attacks go through it, since all of it is differentiable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

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
# Elements of the texts laid out label by label at most; beyond, the distinct texts are kept and gathered.
_LAID_OUT = 1 << 26


@dataclass(frozen=True)
class Bank:
    """What COLA keeps of a text bank.

    Attributes:
        texts: unit features of the texts, float32 [T, dim].
        projected: the same in the subspace's basis, [T, C]; `texts` itself without a projection.
        basis: U_C of equation 3, [dim, C]; None without a projection.
        columns: int64 [K, M], each label's texts; T where a label has fewer. None where the texts are laid out label by
            label, T = K M.
        mask: bool [K, M], which are there.
        full: whether all are.
        centres: mean of each label's texts, [K, dim] (z-bar of equation 6).
    """

    texts: Tensor
    projected: Tensor
    basis: Tensor | None
    columns: Tensor | None
    mask: Tensor
    full: bool
    centres: Tensor

    def block(self, start: int, stop: int) -> Bank:
        """The labels from ``start`` to ``stop`` alone, of texts that are laid out label by label."""
        if start <= 0 and stop >= len(self.mask):
            return self
        width = self.mask.shape[1]
        rows, labels = slice(start * width, stop * width), slice(start, stop)
        return replace(
            self,
            texts=self.texts[rows],
            projected=self.projected[rows],
            mask=self.mask[labels],
            centres=self.centres[labels],
        )

    def by_label(self, values: Tensor) -> Tensor:
        """[..., T] -> [..., K, M]; 0 where a label has no such text."""
        if self.columns is None:
            return values.reshape(*values.shape[:-1], *self.mask.shape)
        gathered: Tensor = pad(values, (0, 1))[..., self.columns]
        return gathered


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
            columns, mask = _columns(bank, self.texts)
            texts, used = bank.texts, columns[mask]
            label = torch.arange(len(mask), device=texts.device)[:, None].expand_as(mask)[mask]
            centres = texts.new_zeros(len(mask), texts.shape[1]).index_add_(0, label, texts[used])
            centres /= mask.sum(1, keepdim=True)
            basis, laid_out = None, False
            if self.projection == "subspace":
                # Every text of every label counts once (a text of two labels twice), as Z of equation 3 has them.
                counts = torch.bincount(used, minlength=len(texts))
                basis = subspace(texts * counts.sqrt()[:, None], self.rank or texts.shape[1] // 2)
            if mask.numel() <= min(2 * len(used), _LAID_OUT // texts.shape[1]):
                # A text of two labels twice, and zeros where there is none: a product is quicker than a gathering.
                texts, laid_out = pad(texts, (0, 0, 0, 1))[columns.flatten()], True
            projected = texts if basis is None else texts @ basis
        return Bank(texts, projected, basis, None if laid_out else columns, mask, bool(mask.all()), centres)

    def logits(self, features: Tensor, bank: TextBank, state: Bank, head: HeadRule) -> Tensor:
        """[N, views, dim] -> [N, K]: tau (1 - d), d the transport cost of equation 7."""
        size = len(features)
        if not (torch.is_grad_enabled() and features.requires_grad):
            size = _MOST_PICTURES
            if state.columns is not None:
                # Distinct texts are multiplied at once, so pictures are what can be cut.
                size = max(1, _chunk(features.device) // (self.views * state.mask.numel()))
        return torch.cat([self._logits(part, state, head.scale) for part in torch.split(features, max(size, 1))])

    def _logits(self, features: Tensor, state: Bank, scale: Tensor) -> Tensor:
        views = normalize(features, dim=-1)
        near = scale * (views @ state.centres.T)
        a = self._view_weights(near)
        projected = views if state.basis is None else views @ state.basis
        lengths = projected.norm(dim=-1)
        directions = projected / lengths.clamp_min(1e-12)[..., None]
        labels, texts = state.mask.shape
        step = labels
        if state.columns is None and not torch.is_grad_enabled():
            # Labels in blocks that fit into the cache: the texts are read from memory once for all pictures.
            step = max(1, _chunk(features.device) // (len(features) * self.views * texts))
        distances = []
        for start in range(0, labels, step):
            block, ours = state.block(start, start + step), slice(start, start + step)
            b = self._text_weights(views[:, 0], near[:, 0], block, ours, scale)
            distances.append(self._distance(directions, a, b, block))
        distance = distances[0] if len(distances) == 1 else torch.cat(distances, 1)
        factor = scale * (a * lengths).sum(1, keepdim=True) if self.calibrated else scale
        logits: Tensor = factor * (1 - distance)
        return logits

    def _distance(self, directions: Tensor, a: Tensor, b: Tensor, state: Bank) -> Tensor:
        """Transport cost [B, K] from unit views [B, N, C] to the labels' texts."""
        if self.coupling == "product":
            # By bilinearity one mean view does for all: N times less work than the costs.
            mean = (a[..., None] * directions).sum(1)
            near: Tensor = torch.linalg.vecdot(state.by_label(mean @ state.projected.T), b)
            return 1 - near
        if self.coupling == "sinkhorn" and state.columns is None and not torch.is_grad_enabled():
            return kernel_cost(self._kernel(directions, state), a, b, self.epsilon, self.iterations)
        cost = 1 - state.by_label(directions @ state.projected.T)
        return transport_cost(cost, a, b, self.coupling, epsilon=self.epsilon, iterations=self.iterations)

    def _kernel(self, directions: Tensor, state: Bank) -> Tensor:
        """Sinkhorn's kernel right out of the product of views and texts, [B, N, K, M]: the costs are never written."""
        offset = directions.new_full((1,), (MIDDLE - 1) / self.epsilon)
        logs = torch.addmm(offset, directions.flatten(0, 1), state.projected.T, alpha=1 / self.epsilon)
        return state.by_label(logs.exp_().view(*directions.shape[:2], -1))

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

    def _text_weights(self, first: Tensor, near: Tensor, state: Bank, labels: slice, scale: Tensor) -> Tensor:
        """b of equation 6 ("computed analogously"), [B, K, M]: a text weighs more, the surer it makes the picture."""
        if self.weights == "uniform":
            share: Tensor = state.mask / state.mask.sum(-1, keepdim=True)
            return share.expand(len(first), -1, -1)
        own = state.by_label((scale * first) @ state.texts.T)
        heights = replaced_entropies(near, own, labels).mul_(-1 / self.temperature)
        if not state.full:
            heights = heights.masked_fill(~state.mask, -torch.inf)
        return heights.softmax(-1)


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _GPU_CHUNK


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


def replaced_entropies(near: Tensor, own: Tensor, labels: slice = slice(None)) -> Tensor:
    """Entropy of the labels' softmax when one label's logit is that of one of its texts instead.

    Args:
        near: [B, K], logits of the labels' centres.
        own: [B, k, M], logits of the texts of some labels.
        labels: which of the K those are; all if not given.

    Returns:
        [B, k, M]. Each is an update of rank one, O(KM) in all instead of O(K^2 M).
    """
    top, best = near.max(-1, keepdim=True)
    shifted = near - top
    weights = shifted.exp()
    others = weights.sum(-1, keepdim=True) - weights
    # The best label's own weight is 1 of the sum: what is left must not be had by a subtraction.
    others = others.scatter(-1, best, weights.scatter(-1, best, 0.0).sum(-1, keepdim=True))
    moments = (weights * shifted).sum(-1, keepdim=True) - weights * shifted
    others, moments = others.clamp_min(0)[:, labels, None], moments[:, labels, None]
    # A text nearer than the best label's centre by more than this is as sure as can be, and e^80 is still a float32.
    raised = (own - top[..., None]).clamp_max(_MOST_RAISED)
    weight = raised.exp()
    total = weight + others
    return total.log() - torch.addcmul(moments, weight, raised) / total


def _columns(bank: TextBank, most: int) -> tuple[Tensor, Tensor]:
    """Each label's first texts as positions in the bank's, [K, M], the rest behind the end; and which are there."""
    lengths = bank.counts.sum(1)
    starts = lengths.cumsum(0) - lengths
    width = min(int(lengths.max()), most)
    place = torch.arange(width, device=lengths.device)
    mask = place < lengths[:, None]
    positions = (starts[:, None] + place).clamp_max(len(bank.rows) - 1)
    return torch.where(mask, bank.rows[positions], len(bank.texts)), mask

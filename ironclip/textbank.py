"""Text banks: a label set's texts through an encoder's text tower, once, for every picture that comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.encoder import Encoder
from ironclip.labels import LabelSet

TENSORS = ("weights", "norms", "texts", "rows", "counts", "blank")


@dataclass(frozen=True)
class TextBank:
    """Text features of a label set, built once and used for every picture.

    The texts are kept flat, each distinct one once: labels with many prompts cost nothing for those with few.

    Attributes:
        encoder: digest of the encoder that made it.
        label_set: digest of the resolved label set.
        descriptions: whether the descriptions were encoded too.
        weights: mean-normalised classifier weights, float32 [K, dim]: unit prompts averaged, then normalised
            (the prompt ensemble of Radford et al. 2021, section 3.1.4).
        norms: mean length of each label's prompt features, float32 [K]: with `weights` the label's point for a
            hyperbolic head, where length says how specific a label is.
        texts: unit features of the distinct texts, float32 [T, dim].
        rows: for label after label its prompts, then its descriptions, as indices into `texts`, int64 [S].
        counts: how many prompts and descriptions each label has, int64 [K, 2]; they sum to S.
        blank: unit mean of the templates with no name in them, float32 [dim]; zeros without descriptions.
    """

    encoder: str
    label_set: str
    descriptions: bool
    weights: Tensor
    norms: Tensor
    texts: Tensor
    rows: Tensor
    counts: Tensor
    blank: Tensor

    def padded(self) -> tuple[Tensor, Tensor]:
        """Texts by label, for defences that compare with each of them.

        Returns:
            float32 [K, M, dim] with zeros where a label has fewer than M texts, and bool [K, M] saying which are
            there; within a label prompts come before descriptions.
        """
        lengths = self.counts.sum(dim=1)
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        features = self.texts.new_zeros(*mask.shape, self.texts.shape[1])
        features[mask] = self.texts[self.rows]
        return features, mask

    def to(self, device: torch.device | str) -> TextBank:
        """The bank on another device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved)


@dataclass(frozen=True)
class BankTexts:
    """What a bank needs encoded, and how it is put together from that.

    Attributes:
        label_set: resolved.
        descriptions: whether the descriptions are among the texts.
        texts: each distinct text once, then the templates with no name in them, if descriptions are asked for.
        blanks: how many those are.
        rows, counts: as in TextBank.
    """

    label_set: LabelSet
    descriptions: bool
    texts: tuple[str, ...]
    blanks: int
    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, encoder: Encoder, label_set: LabelSet, *, descriptions: bool = False) -> BankTexts:
        """The texts of a label set, resolved with the encoder's templates."""
        label_set = label_set.resolve(encoder)
        prompts = [label_set.prompts(label) for label in label_set.labels]
        more = [
            described(own[0], label.descriptions) if descriptions else ()
            for own, label in zip(prompts, label_set.labels, strict=True)
        ]
        index: dict[str, int] = {}
        rows = [
            index.setdefault(text, len(index))
            for own, extra in zip(prompts, more, strict=True)
            for text in (*own, *extra)
        ]
        templates = label_set.templates or encoder.default_templates
        blanks = tuple(template.replace("{}", "").strip() for template in templates) if descriptions else ()
        with torch.inference_mode(False):
            counts = torch.tensor([[len(own), len(extra)] for own, extra in zip(prompts, more, strict=True)])
            return cls(label_set, descriptions, (*index, *blanks), len(blanks), torch.tensor(rows), counts)

    def bank(self, encoder: Encoder, features: Tensor) -> TextBank:
        """The bank, from the features of `texts` in their order, float32 [T, dim], not normalised."""
        # no_grad, and out of a caller's inference_mode: an attack's backward pass goes through these tensors.
        with torch.inference_mode(False), torch.no_grad():
            count, counts = len(self.texts) - self.blanks, self.counts
            unit, lengths = normalize(features, dim=-1), features.norm(dim=-1)
            texts, blank = unit[:count], normalize(unit[count:].sum(0), dim=-1)
            label = torch.repeat_interleave(torch.arange(len(counts)), counts.sum(dim=1))
            place = torch.arange(len(self.rows)) - (counts.sum(dim=1).cumsum(0) - counts.sum(dim=1))[label]
            is_prompt = place < counts[label, 0]
            sums = texts.new_zeros(len(counts), texts.shape[1])
            sums.index_add_(0, label[is_prompt].to(texts.device), texts[self.rows[is_prompt].to(texts.device)])
            weights = normalize(sums, dim=-1)
            norms = lengths.new_zeros(len(counts))
            norms.index_add_(0, label[is_prompt].to(texts.device), lengths[self.rows[is_prompt].to(texts.device)])
            norms /= counts[:, 0].to(texts.device)
        digests = (encoder.digest, self.label_set.digest, self.descriptions)
        bank = TextBank(*digests, weights, norms, texts, self.rows, counts, blank)
        return bank.to(encoder.device)


def described(prompt: str, descriptions: Sequence[str]) -> tuple[str, ...]:
    """Each description behind the label's prompt: a keyword alone would name other labels too.

    The form is AWT's (Zhu et al. 2024): "a photo of a dog. it barks."
    """
    return tuple(f"{prompt.rstrip(' .')}. {description.rstrip(' .')}." for description in descriptions)


def build_text_bank(
    encoder: Encoder, label_set: LabelSet, *, descriptions: bool = False, truncate: bool = False, batch_size: int = 256
) -> TextBank:
    """Encode a label set's texts, each distinct text once.

    Args:
        encoder: its text tower is used, in its dtype.
        label_set: is resolved with the encoder's templates first.
        descriptions: encode the descriptions too.
        truncate: cut texts longer than the encoder's context instead of refusing them.
        batch_size: texts per forward.

    Raises:
        LabelError: a text is longer than the encoder reads.
    """
    needed = BankTexts.of(encoder, label_set, descriptions=descriptions)
    with torch.inference_mode(False), torch.no_grad():
        features = encoder.encode_text(needed.texts, truncate=truncate, batch_size=batch_size)
    return needed.bank(encoder, features)

"""Encoder: an open_clip model whose image tower takes pixels in [0,1], normalisation inside.

The mean and standard deviation of the model's training data are buffers of the Encoder, so that whatever
attacks, evaluates or serves it works on the picture itself: a perturbation budget of n/255 means n/255.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ironclip.errors import ArtifactError, LabelError, OptionError
from ironclip.folding import convolutional, folded
from ironclip.head import Head
from ironclip.int8 import quantize
from ironclip.preprocessing import Preprocessing
from ironclip.tokenizing import CopyableLock, bound_tokenizer, check_words
from ironclip.upcast import pays, upcast

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Least cosine of features before and after layers were exchanged, for a tower that is not broken by it.
_ALIKE = 0.9
# Texts whose token ids identify a tokenizer by what it does (case, accents, other scripts, digits, emoji).
_TOKENIZER_PROBES = (
    "a photo of a dog.",
    "A  Photo of the DOG's 2 bowls!",
    "naïve café, señor",
    "犬の写真 собака كلب",
    "🥕 carrot-like (n=1,024)",
)


class Encoder(nn.Module):
    """Image and text towers of one open_clip model.

    Args:
        model: an open_clip CLIP, CustomTextCLIP or CoCa.
        tokenizer: open_clip's tokenizer for it.
        model_cfg: open_clip's `model_cfg`, as written to `open_clip_config.json`.
        preprocess_cfg: open_clip's `preprocess_cfg` (size, mean, std, interpolation, resize_mode, ...).
        spec: what was asked for, for messages.
        head: how features become a decision.
        provenance: the content of `ironclip.json`, empty for a model that is not ours.
        folder: the artifact's folder, if it came from one.

    Attributes:
        dim: length of a feature vector.
        resolution: side of the square input, in pixels.
        preprocessing: picture -> uint8 pixels at that resolution.
        dtype: what the towers compute in; features always come back as float32.
        form: `trained`, or `served` for a copy that `served` made, which only answers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        model_cfg: Mapping[str, Any],
        preprocess_cfg: Mapping[str, Any],
        spec: str = "",
        head: Head | None = None,
        provenance: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        bound_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.model_cfg = json.loads(json.dumps(dict(model_cfg)))  # plain JSON values, as an artifact stores them
        self.preprocess_cfg = dict(preprocess_cfg)
        self.spec = spec
        self.head = head or Head()
        self.provenance = dict(provenance or {})
        self.folder = folder
        self.dim = int(self.model_cfg["embed_dim"])
        self.context_length = int(tokenizer.context_length)
        self.preprocessing = Preprocessing.from_open_clip(self.preprocess_cfg)
        self.resolution = self.preprocessing.resolution
        self.default_templates: tuple[str, ...] = tuple(self.provenance.get("default_templates") or DEFAULT_TEMPLATES)
        self.register_buffer("mean", _channels(self.preprocess_cfg, "mean"), persistent=False)
        self.register_buffer("std", _channels(self.preprocess_cfg, "std"), persistent=False)
        self.form = "trained"
        # Where layers were exchanged, so that it is not that of the parameters.
        self._dtype: torch.dtype | None = None
        self._memory_format = torch.contiguous_format
        self._digest: tuple[object, str] | None = None
        # Hugging Face's fast tokenizers hold their padding as state: two threads at once would mix it up.
        self._tokenizing = CopyableLock()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the towers; int8 where the image tower's products are."""
        return self._dtype or next(self.model.visual.parameters()).dtype  # type: ignore[union-attr]

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype that products are computed in: `dtype`, or float32 on a CPU that has no arithmetic for it."""
        return self.dtype if self._dtype in (None, torch.int8) else torch.float32

    @property
    def _between(self) -> torch.dtype:
        """The dtype of what lies between layers."""
        return torch.float32 if self._dtype == torch.int8 else self.dtype

    @property
    def device(self) -> torch.device:
        """The device that the towers are on."""
        return self.mean.device

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learnt temperature: a float32 scalar (100 for OpenAI's CLIP)."""
        scale: Tensor = self.model.logit_scale  # type: ignore[assignment]
        return scale.float().exp().reshape(())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image features, not normalised.

        Args:
            pixels: float RGB in [0,1], [N, 3, resolution, resolution].

        Returns:
            float32 [N, dim]; differentiable with respect to `pixels`.

        Raises:
            ValueError: another shape, or integers (uint8 pixels are divided by 255 first).
        """
        side = self.resolution
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or not pixels.is_floating_point():
            raise ValueError(f"pixels must be float [N, 3, {side}, {side}], got {pixels.dtype} {list(pixels.shape)}")
        normalised = (pixels.float() - self.mean) / self.std
        images = normalised.to(self._between).contiguous(memory_format=self._memory_format)
        features: Tensor = self.model.encode_image(images, normalize=False)  # type: ignore[operator]
        return features.float()

    def tokenize(self, texts: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Token ids, int64 [N, context_length].

        Raises:
            LabelError: a text is longer than the context and `truncate` is off (the count is in the text), or has
                an endless word.
        """
        for text in texts:
            check_words(self.tokenizer, text)
        with self._tokenizing:
            tokens: Tensor = self.tokenizer(list(texts))
            if not truncate:
                for text, row in zip(texts, tokens, strict=True):
                    # A row of open_clip's that is not full cannot have been cut; counting would read it again.
                    full = not isinstance(self.tokenizer, open_clip.SimpleTokenizer) or bool(row[-1])
                    if full and (count := self._count(text)) > self.context_length:
                        error = LabelError(
                            f"A text has {count} tokens, this encoder reads {self.context_length}: shorten "
                            f"{text[:60]!r}.",
                            limit=self.context_length,
                        )
                        error.may_be_cut = True
                        raise error
        return tokens

    def count_tokens(self, text: str) -> int:
        """Tokens of one text, start and end marks included."""
        with self._tokenizing:
            return self._count(text)

    def _count(self, text: str) -> int:
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return len(self.tokenizer.encode(text)) + 2
        clean = getattr(self.tokenizer, "clean_fn", str)
        return len(self.tokenizer.tokenizer(clean(text))["input_ids"])

    def encode_text(self, texts: Sequence[str], *, truncate: bool = False, batch_size: int = 256) -> Tensor:
        """Text features, not normalised: float32 [N, dim]. Raises LabelError for an over-long text."""
        if not texts:
            return torch.empty(0, self.dim, device=self.device)
        tokens = self.tokenize(texts, truncate=truncate)
        # Longest last, so that texts of like length share a batch and little padding is computed.
        order = torch.argsort(_lengths(tokens), stable=True)
        parts = [self.encode_tokens(tokens[part]) for part in torch.split(order, batch_size)]
        return torch.cat(parts)[torch.argsort(order).to(self.device)]

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Text features of token ids [N, L], not normalised: float32 [N, dim].

        A causal tower that reads its answer at the end mark cannot see the padding behind it, so the columns
        that are padding in every row are left out; the features are the same and most of the work is saved.
        """
        model: Any = self.model
        if not self._pools_at_end:
            features: Tensor = model.encode_text(tokens.to(self.device), normalize=False)
            return features.float()
        pooled = self.pool_tokens(tokens)
        projection = model.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return pooled.float()

    @property
    def _pools_at_end(self) -> bool:
        model: Any = self.model
        return isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax" and model.attn_mask is not None

    def pool_tokens(self, tokens: Tensor, shift: Tensor | None = None) -> Tensor:
        """What the text tower says of token ids [N, L] before its projection: [N, width], in the tower's dtype.

        Args:
            tokens: as `tokenize` makes them.
            shift: [N, L, width], added to the token embeddings; differentiable.

        Raises:
            OptionError: a text tower of another form than CLIP's.
        """
        if not self._pools_at_end:
            raise OptionError("only a CLIP text tower that reads its answer at the end mark has features to pool")
        model: Any = self.model
        tokens = tokens.to(self.device)
        length = int(_lengths(tokens).max())
        tokens = tokens[:, :length]
        embedded = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = (embedded if shift is None else embedded + shift[:, :length]).to(self._between)
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length].to(self._between)))
        pooled: Tensor = text_global_pool(x, tokens, "argmax")
        return pooled

    def astype(self, dtype: torch.dtype) -> Encoder:
        """A copy whose towers hold and compute in `dtype`; the temperature stays float32.

        Raises:
            ValueError: this is a low-precision copy itself; its lost digits would come back as another encoder.
        """
        if self.dtype not in (torch.float32, dtype) or self._dtype is not None:
            raise ValueError(f"astype starts from the float32 encoder, not from a {self.dtype} copy")
        if not dtype.is_floating_point:
            raise ValueError(f"towers hold floating-point numbers; {dtype} is for `served` alone")
        other = copy.deepcopy(self)
        other.model.to(dtype)
        for name in ("logit_scale", "logit_bias"):
            parameter = getattr(self.model, name, None)
            if parameter is not None:
                getattr(other.model, name).data = parameter.data.clone().float()
        # The same encoder: the dtype is named beside the digest wherever it matters.
        other._digest = (other._versions(), self.digest)
        return other

    def served(self, dtype: torch.dtype = torch.float32) -> Encoder:
        """A frozen copy that answers fastest, and the same up to rounding: what the service runs, and what is attacked.

        Towers hold and compute in `dtype`, and int8 is for the image tower's linear layers alone (`ironclip.int8`); a
        convolutional image tower has its batch norms folded (`ironclip.folding`) and its channels last, and on a CPU
        that has no arithmetic for `dtype` products are float32 (`ironclip.upcast`). It has this encoder's digest and
        cannot be saved. Where nothing would change it is this encoder itself: weights are not held twice.

        Raises:
            ValueError: as `astype`.
            OptionError: int8 on a GPU, or for a tower without linear layers.
        """
        if dtype == torch.int8 and self.device.type != "cpu":
            raise OptionError("int8 is for CPUs: on a GPU set the dtype to float16, bfloat16 or auto.")
        if dtype == self.dtype and not (self.form == "trained" and convolutional(self.model.visual)):  # type: ignore[arg-type]
            return self
        other = self._frozen(torch.float32 if dtype == torch.int8 else dtype)
        if dtype == torch.int8:
            quantize(other.model.visual)  # type: ignore[arg-type]
            other._dtype = dtype
            if not self._answered_alike(other):
                raise OptionError(
                    "This image tower cannot be int8: it reads weights past its layers, or its features change too "
                    "much. Set the dtype to auto."
                )
        elif self.upcasts(dtype):
            upcast(other.model)
            other._dtype = dtype
            if not self._answered_alike(other):
                other = self._frozen(dtype)
        other.form = "served"
        other._digest = (other._versions(), self.digest)
        return other

    def upcasts(self, dtype: torch.dtype) -> bool:
        """Whether products of a served copy in `dtype` would be made in float32, since this CPU has no better."""
        return dtype != torch.int8 and self.device.type == "cpu" and pays(dtype)

    def _frozen(self, dtype: torch.dtype) -> Encoder:
        """A copy in `dtype` that takes no gradients of its weights, a convolutional image tower in its fastest form."""
        other = self.astype(dtype)
        if convolutional(self.model.visual):  # type: ignore[arg-type]
            visual = folded(self.model.visual)  # type: ignore[arg-type]
            other._memory_format = torch.channels_last
            other.model.visual = visual.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        other.requires_grad_(False)
        return other

    @torch.inference_mode()
    def _answered_alike(self, other: Encoder) -> bool:
        """Whether a copy with exchanged layers still computes the same: foreign blocks may read weights past them."""
        side = self.resolution
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)
        tokens = self.tokenize(_TOKENIZER_PROBES[:1], truncate=True)
        try:
            ours, theirs = ((one.encode_image(pixels), one.encode_tokens(tokens)) for one in (self, other))
        except (AttributeError, RuntimeError, TypeError):
            return False
        return all(float(cosine_similarity(one, two)) > _ALIKE for one, two in zip(ours, theirs, strict=True))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over weights, config, head and what the tokenizer does; computed anew after a change."""
        versions = self._versions()
        # A served copy's weights are not those that the digest is of; they do not change.
        if self._digest is None or (self._digest[0] != versions and self.form == "trained"):
            self._digest = (versions, self._compute_digest())
        return self._digest[1]

    def _versions(self) -> object:
        """Changes whenever a weight is written or exchanged, without looking at the values."""
        tensors = [*self.parameters(), *self.buffers()]
        return tuple((t.data_ptr(), t._version) for t in tensors)

    def _compute_digest(self) -> str:
        identity = {
            "model_cfg": self.model_cfg,
            "preprocessing": self.preprocessing.digest,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "head": self.head.to_json(),
            "tokens": self.tokenize(_TOKENIZER_PROBES, truncate=True).tolist(),
            "vocabulary": self._vocabulary(),
        }
        sha = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            sha.update(f"{name}:{list(values.shape)}".encode())
            sha.update(values.contiguous().numpy().data)
        return sha.hexdigest()

    def _vocabulary(self) -> str:
        inner = self.tokenizer if isinstance(self.tokenizer, open_clip.SimpleTokenizer) else self.tokenizer.tokenizer
        words = inner.encoder if isinstance(inner, open_clip.SimpleTokenizer) else inner.get_vocab()
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _channels(preprocess_cfg: Mapping[str, Any], key: str) -> Tensor:
    """`mean` or `std` as [1, 3, 1, 1]; raises ArtifactError unless they are three finite numbers, std above 0."""
    try:
        values = torch.tensor([float(value) for value in preprocess_cfg[key]])
    except (KeyError, TypeError, ValueError):
        values = torch.empty(0)
    if values.shape != (3,) or not values.isfinite().all() or (key == "std" and not (values > 0).all()):
        raise ArtifactError(f"The {key} in preprocess_cfg is {preprocess_cfg.get(key)!r}, not three usable numbers.")
    return values.view(1, 3, 1, 1)


def _lengths(tokens: Tensor) -> Tensor:
    """Length of each row up to and with its end mark, which has the highest id in CLIP's vocabulary: int64 [N]."""
    return tokens.argmax(dim=-1).cpu() + 1

"""Label sets: the caller's names, made into prompts (`ironclip.textbank` encodes them).

A label is a name, or a name with its own prompts and descriptions. A prompt is a whole text ("a photo of a
dog."); a label without prompts gets them from the templates. Descriptions are further texts about the label
("it has four legs and barks"), for defences that compare a picture with many texts; they never change the
classifier weights.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ironclip.encoder import Encoder
from ironclip.errors import LabelError, TooManyLabels

# The short lists of OpenAI's CLIP notebook (Radford et al. 2021): one plain prompt, and the seven that an
# ImageNet search kept of eighty.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "this-is-a-photo": ("This is a photo of a {}.",),
    "imagenet-7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "emoji": ("an emoji of {}",),
}

_CANONICAL = 1  # version of the canonical form; part of the digest


@dataclass(frozen=True)
class LabelLimits:
    """How much text one label set may hold.

    Attributes:
        labels: labels in the set.
        texts_per_label: prompts, and separately descriptions, of one label.
        templates: templates of the set.
        text_chars: characters of one name, prompt, description or template.
        texts: prompts (after the templates are filled in) and descriptions of all labels together.
    """

    labels: int = 20_000
    texts_per_label: int = 200
    templates: int = 100
    text_chars: int = 1_000
    texts: int = 200_000


@dataclass(frozen=True)
class Label:
    """One label: its name, its own prompts (else the templates make them), and descriptions."""

    name: str
    prompts: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    def to_json(self) -> str | dict[str, Any]:
        """The shortest form that parses back to this label."""
        if not self.prompts and not self.descriptions:
            return self.name
        form: dict[str, Any] = {"name": self.name}
        if self.prompts:
            form["prompts"] = list(self.prompts)
        if self.descriptions:
            form["descriptions"] = list(self.descriptions)
        return form


@dataclass(frozen=True)
class LabelSet:
    """Labels in the caller's order, and the templates that make their prompts.

    Attributes:
        labels: unique names, NFC, stripped.
        templates: each with `{}` where the name goes; empty for "the encoder's own".
    """

    labels: tuple[Label, ...]
    templates: tuple[str, ...] = ()
    limits: LabelLimits = field(default_factory=LabelLimits, compare=False, repr=False)

    @classmethod
    def parse(
        cls, labels: object, templates: object = None, *, limits: LabelLimits | None = None, pointer: str = ""
    ) -> LabelSet:
        """Check what a caller sent and bring it into canonical form.

        Args:
            labels: a list of strings or `{"name", "prompts"?, "descriptions"?}`.
            templates: a list of strings with `{}`, the name of a list in TEMPLATES, or None.
            limits: what is allowed; LabelLimits() if not given.
            pointer: JSON Pointer of the object that holds `labels` and `templates`, for messages.

        Raises:
            LabelError, TooManyLabels: with a pointer to the offending part.
        """
        limits = limits or LabelLimits()
        at = f"{pointer}/labels"
        if not isinstance(labels, (list, tuple)) or not labels:
            raise LabelError("Give at least one label: a list of names.", pointer=at)
        if len(labels) > limits.labels:
            raise TooManyLabels(
                f"{len(labels)} labels were given, at most {limits.labels} are allowed here.",
                pointer=at,
                limit=limits.labels,
            )
        parsed = tuple(_label(value, f"{at}/{i}", limits) for i, value in enumerate(labels))
        seen: dict[str, int] = {}
        for i, label in enumerate(parsed):
            if label.name in seen:
                raise LabelError(
                    f"The label {label.name[:60]!r} stands twice, at {seen[label.name]} and {i}; names must differ.",
                    pointer=f"{at}/{i}",
                )
            seen[label.name] = i
        return cls(parsed, _templates(templates, f"{pointer}/templates", limits), limits).checked(pointer)

    @classmethod
    def from_json(cls, content: object, *, limits: LabelLimits | None = None, pointer: str = "") -> LabelSet:
        """Read `{"labels": [...], "templates": [...]?}` (the form of files and of `PUT /label-sets`)."""
        if not isinstance(content, Mapping) or "labels" not in content:
            raise LabelError('A label set is {"labels": [...], "templates": [...]}.', pointer=pointer or None)
        unknown = sorted(set(content) - {"labels", "templates"})
        if unknown:
            raise LabelError(f"Unknown key in the label set: {unknown[0][:60]!r}.", pointer=pointer or None)
        return cls.parse(content["labels"], content.get("templates"), limits=limits, pointer=pointer)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The labels' names, in order."""
        return tuple(label.name for label in self.labels)

    def canonical(self) -> dict[str, Any]:
        """The canonical form: NFC, stripped, order kept; equal sets have equal canonical forms."""
        form: dict[str, Any] = {"labels": [label.to_json() for label in self.labels]}
        if self.templates:
            form["templates"] = list(self.templates)
        return form

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form."""
        form = {"version": _CANONICAL, **self.canonical()}
        return hashlib.sha256(json.dumps(form, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def with_templates(self, templates: object) -> LabelSet:
        """The same labels under other templates, given as to `parse`; raises LabelError, TooManyLabels."""
        return replace(self, templates=_templates(templates, "/templates", self.limits)).checked()

    def checked(self, pointer: str = "") -> LabelSet:
        """This set, if the prompts that it makes are within the limits; raises TooManyLabels."""
        per_label = max(len(self.templates), 1)
        total = sum(len(label.prompts) or per_label for label in self.labels)
        total += sum(len(label.descriptions) for label in self.labels)
        if total > self.limits.texts:
            raise TooManyLabels(
                f"These labels make {total} prompts and descriptions, at most {self.limits.texts} are allowed.",
                pointer=f"{pointer}/labels",
                limit=self.limits.texts,
            )
        return self

    def resolve(self, encoder: Encoder) -> LabelSet:
        """The same labels, with the encoder's own templates where the set has none."""
        return self if self.templates else replace(self, templates=encoder.default_templates)

    def prompts(self, label: Label) -> tuple[str, ...]:
        """The prompts of one label: its own, or the filled templates. Call on a resolved set."""
        return label.prompts or tuple(template.replace("{}", label.name) for template in self.templates)


def _label(value: object, pointer: str, limits: LabelLimits) -> Label:
    if isinstance(value, str):
        return Label(_text(value, pointer, limits))
    if not isinstance(value, Mapping) or "name" not in value:
        raise LabelError('A label is a string or {"name", "prompts"?, "descriptions"?}.', pointer=pointer)
    unknown = sorted(str(key) for key in set(value) - {"name", "prompts", "descriptions"})
    if unknown:
        raise LabelError(f"Unknown key in a label: {unknown[0][:60]!r}.", pointer=pointer)
    return Label(
        _text(value["name"], f"{pointer}/name", limits),
        _texts(value.get("prompts"), f"{pointer}/prompts", limits),
        _texts(value.get("descriptions"), f"{pointer}/descriptions", limits),
    )


def _texts(value: object, pointer: str, limits: LabelLimits) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise LabelError("Give a list of texts.", pointer=pointer)
    if len(value) > limits.texts_per_label:
        raise TooManyLabels(
            f"{len(value)} texts for one label, at most {limits.texts_per_label} are allowed.",
            pointer=pointer,
            limit=limits.texts_per_label,
        )
    return tuple(dict.fromkeys(_text(text, f"{pointer}/{i}", limits) for i, text in enumerate(value)))


def _templates(value: object, pointer: str, limits: LabelLimits) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        if value not in TEMPLATES:
            raise LabelError(
                f"No list of templates is named {value[:60]!r}; there are {', '.join(TEMPLATES)}; or give a list.",
                pointer=pointer,
            )
        return TEMPLATES[value]
    if not isinstance(value, (list, tuple)):
        raise LabelError("Templates are a list of texts with {} for the name.", pointer=pointer)
    if len(value) > limits.templates:
        raise TooManyLabels(
            f"{len(value)} templates, at most {limits.templates} are allowed.",
            pointer=pointer,
            limit=limits.templates,
        )
    templates = tuple(dict.fromkeys(_text(text, f"{pointer}/{i}", limits) for i, text in enumerate(value)))
    for i, template in enumerate(templates):
        if "{}" not in template:
            raise LabelError(f"The template {template[:60]!r} has no {{}} for the name.", pointer=f"{pointer}/{i}")
    return templates


def _text(value: object, pointer: str, limits: LabelLimits) -> str:
    """One text in canonical form: a non-empty NFC string without control characters or lone surrogates."""
    if not isinstance(value, str):
        raise LabelError(f"A text was expected, not {type(value).__name__}.", pointer=pointer)
    if len(value) > limits.text_chars:
        raise LabelError(
            f"A text of {len(value)} characters; at most {limits.text_chars} are allowed.",
            pointer=pointer,
            limit=limits.text_chars,
        )
    text = unicodedata.normalize("NFC", value).strip()
    if all(unicodedata.category(c) in ("Cf", "Zs") for c in text):
        raise LabelError("A text is empty.", pointer=pointer)
    bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad is not None:
        raise LabelError(f"A text holds the character U+{ord(bad):04X}, which no prompt can have.", pointer=pointer)
    return text

"""Answers as frozen dataclasses.

The service grows by addition: what this version does not know stays in `raw`, beside the fields that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

from ironclip_client.errors import IronclipError, Problem, from_problem
from ironclip_client.parsing import EMPTY, each, pick, raw_field

T = TypeVar("T")


@dataclass(frozen=True)
class Meta:
    """About the exchange, not the answer: the request's id, `Cache-Status`, `Server-Timing`, and tries before it."""

    request_id: str = ""
    cache_status: str = ""
    server_timing: str = ""
    retries: int = 0


class Batch(Sequence[T | IronclipError], Generic[T]):
    """Outcomes in the order of what was sent: for each item its answer, or the error that kept it from one."""

    def __init__(self, items: Iterable[T | IronclipError], meta: Meta | None = None) -> None:
        self._items: tuple[T | IronclipError, ...] = tuple(items)
        self.meta = meta or Meta()

    @overload
    def __getitem__(self, index: int) -> T | IronclipError: ...
    @overload
    def __getitem__(self, index: slice) -> Batch[T]: ...
    def __getitem__(self, index: int | slice) -> T | IronclipError | Batch[T]:
        return Batch(self._items[index], self.meta) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Batch) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def errors(self) -> dict[int, IronclipError]:
        """What failed, by position."""
        return {i: item for i, item in enumerate(self._items) if isinstance(item, IronclipError)}

    def raise_for_error(self) -> list[T]:
        """All answers; raises the first item's error if any failed."""
        good: list[T] = []
        for item in self._items:
            if isinstance(item, IronclipError):
                raise item
            good.append(item)
        return good

    def __repr__(self) -> str:
        failed = len(self.errors)
        first = ", ".join(repr(item) for item in self._items[:3])
        return f"<Batch of {len(self)}{f', {failed} failed' if failed else ''}: [{first}{', ...' * (len(self) > 3)}]>"


def batch(values: object, reader: Callable[[Any], T], meta: Meta | None = None) -> Batch[T]:
    """Outcomes from a list in which `{"error": problem}` stands for an item that failed."""

    def outcome(value: Any) -> T | IronclipError:
        problem = Problem.parse(value.get("error")) if isinstance(value, Mapping) else None
        return reader(value) if problem is None else from_problem(problem)

    return Batch(each(outcome)(values), meta)


@dataclass(frozen=True)
class EncoderRef:
    """Which encoder answered, exactly."""

    name: str
    digest: str
    dtype: str
    head: str

    def __repr__(self) -> str:
        return f"EncoderRef({self.name!r}, {self.digest[:12]}, {self.dtype}, {self.head})"


@dataclass(frozen=True)
class LabelSetRef:
    """Which labels were used, exactly; `name` if they were registered."""

    digest: str
    name: str | None = None

    @property
    def reference(self) -> str | None:
        """`name@digest`, which as `label_set` pins this version; None for labels that came with the request."""
        return None if self.name is None else f"{self.name}@{self.digest}"

    def __repr__(self) -> str:
        return f"LabelSetRef({self.name!r}, {self.digest[:12]})"


@dataclass(frozen=True)
class Preprocessing:
    """How a picture became pixels, and what was done to it that a viewer may not expect."""

    digest: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """Whether the picture is of the kind that the encoder was trained on."""

    inside: bool
    score: float
    threshold: float
    description: str
    warning: str | None = None


@dataclass(frozen=True)
class Prediction:
    """One label: its softmax over all labels, and the cosine of picture and label (None for a level's node)."""

    label: str
    score: float
    cosine: float | None = None


@dataclass(frozen=True, repr=False)
class Classification:
    """The answer for one picture; predictions come best first."""

    predictions: tuple[Prediction, ...]
    encoder: EncoderRef
    label_set: LabelSetRef
    preprocessing: Preprocessing
    defence: Mapping[str, Any]
    levels: Mapping[str, tuple[Prediction, ...]] = field(default_factory=dict)
    domain: Domain | None = None
    meta: Meta = field(default_factory=Meta, repr=False, compare=False)
    raw: Mapping[str, Any] = raw_field()

    @property
    def label(self) -> str:
        """The best label."""
        return self.predictions[0].label

    @property
    def score(self) -> float:
        """The best label's score."""
        return self.predictions[0].score

    def __repr__(self) -> str:
        best = ", ".join(f"{one.label} {one.score:.3f}" for one in self.predictions[:3])
        outside = "" if self.domain is None or self.domain.inside else ", outside the encoder's domain"
        return f"<Classification {best}{', ...' * (len(self.predictions) > 3)} by {self.encoder.name}{outside}>"


def classification(data: object, meta: Meta | None = None) -> Classification:
    """Read the answer for one picture."""
    predictions = each(lambda value: pick(Prediction, value))
    return pick(
        Classification,
        data,
        own=EMPTY if meta is None else {"meta": meta},
        predictions=predictions,
        encoder=encoder_ref,
        label_set=label_set_ref,
        preprocessing=preprocessing,
        levels=lambda value: {name: predictions(nodes) for name, nodes in value.items()},
        domain=lambda value: pick(Domain, value),
    )


def encoder_ref(data: object) -> EncoderRef:
    """Read which encoder answered."""
    return pick(EncoderRef, data)


def label_set_ref(data: object) -> LabelSetRef:
    """Read which labels were used."""
    return pick(LabelSetRef, data)


def preprocessing(data: object) -> Preprocessing:
    """Read how a picture became pixels."""
    return pick(Preprocessing, data, warnings=tuple)


@dataclass(frozen=True)
class LabelSetSummary:
    """One label set of the list."""

    name: str
    digest: str
    read_only: bool

    @property
    def reference(self) -> str:
        """`name@digest`, which as `label_set` pins this version."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class LabelSet(LabelSetSummary):
    """A registered label set in canonical form: its labels with prompts and descriptions, templates and tree."""

    labels: tuple[Any, ...] = ()
    templates: tuple[str, ...] | str | None = None
    tree: Mapping[str, Any] | str | None = None
    raw: Mapping[str, Any] = raw_field()

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names alone."""
        return tuple(one["name"] if isinstance(one, Mapping) else str(one) for one in self.labels)

    def __repr__(self) -> str:
        return f"<LabelSet {self.name} of {len(self.labels)} labels, {self.digest[:12]}>"


@dataclass(frozen=True)
class Model:
    """One served encoder; `raw` has preprocessing, provenance, measured scores and all else."""

    name: str
    digest: str
    dtype: str
    head: str
    dim: int
    resolution: int
    context_length: int
    capabilities: tuple[str, ...] = ()
    default_templates: tuple[str, ...] = ()
    defence: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = raw_field()

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.resolution} px, {self.dim} numbers, {self.dtype}, {self.digest[:12]}>"


@dataclass(frozen=True)
class Models:
    """What is served: encoders, and what every request may ask for."""

    default: str
    models: tuple[Model, ...]
    defences: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    templates: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = raw_field()


@dataclass(frozen=True)
class ModelVersion:
    """One version of an encoder; `failure` is the problem that keeps it from being served."""

    role: str
    state: str
    share: float
    since: str
    digest: str | None
    spec: str
    source: str
    defence: Mapping[str, Any] = field(default_factory=dict)
    requests_in_hand: int = 0
    notes: tuple[str, ...] = ()
    failure: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = raw_field()


@dataclass(frozen=True)
class ModelVersions:
    """The versions of an encoder: stable, canary, coming, leaving, and the last that failed."""

    name: str
    versions: tuple[ModelVersion, ...]
    raw: Mapping[str, Any] = raw_field()

    def of(self, role: str) -> ModelVersion | None:
        """The version with this role, such as `stable`; None if there is none."""
        return next((one for one in self.versions if one.role == role), None)


def model(data: object) -> Model:
    """Read one served encoder."""
    return pick(Model, data, capabilities=tuple, default_templates=tuple)


@dataclass(frozen=True)
class Readiness:
    """Whether the service can answer, and if not why; true or false by itself."""

    ready: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ready

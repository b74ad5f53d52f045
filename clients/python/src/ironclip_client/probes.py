"""What `/attack-probe` and `/probes` answer."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ironclip_client.errors import IronclipError, Problem, UnexpectedAnswer, from_problem
from ironclip_client.images import from_data_uri
from ironclip_client.parsing import EMPTY, each, pick, raw_field
from ironclip_client.results import (
    EncoderRef,
    LabelSetRef,
    Meta,
    Preprocessing,
    encoder_ref,
    label_set_ref,
    preprocessing,
)

ENDS = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class ProbePoint:
    """What is known of one radius; `broken` is None where the probe ended before it was decided."""

    eps: float
    broken: bool | None
    state: str
    steps: int
    gradients: int
    score_of_label: float | None = None
    cosine: float | None = None
    label: str | None = None
    score: float | None = None
    attack: str | None = None
    part: str | None = None
    raw: Mapping[str, Any] = raw_field()


@dataclass(frozen=True)
class ProbeClean:
    """The decision about the picture as it is."""

    label: str | None = None
    score: float | None = None
    margin: float | None = None
    correct: bool | None = None
    raw: Mapping[str, Any] = raw_field()


@dataclass(frozen=True, repr=False)
class ProbeResult:
    """What a probe found: empirical, not a certificate. Radii are in 1/255 for `linf`, see `unit`."""

    status: str
    statement: str
    objective: str
    clean: ProbeClean
    label: str | None
    target: str | None
    norm: str
    unit: str
    resolution: int
    points: tuple[ProbePoint, ...]
    robust_to: float
    broken_at: float | None
    effort: str
    attack: Mapping[str, Any]
    cost: Mapping[str, float]
    warnings: tuple[Mapping[str, str], ...]
    encoder: EncoderRef
    label_set: LabelSetRef | None
    level: str | None
    defence: Mapping[str, Any]
    preprocessing: Preprocessing
    artefacts: Mapping[str, Any] | None = None
    meta: Meta = field(default_factory=Meta, repr=False, compare=False)
    raw: Mapping[str, Any] = raw_field()

    @property
    def complete(self) -> bool:
        """Whether it ran to its end; else its time or its gradients were used up and this is what was known."""
        return self.status == "complete"

    def picture(self, name: str = "adversarial") -> bytes:
        """A picture that was asked for in `artefacts`, as PNG.

        Raises:
            KeyError: it was not asked for, or nothing broke the decision.
        """
        found = (self.artefacts or {}).get(name)
        if not isinstance(found, str):
            raise KeyError(f"{name!r} is not there: ask for it in artefacts=; there is none where nothing broke.")
        return from_data_uri(found)

    def __repr__(self) -> str:
        what = self.label or self.objective
        broken = "not broken" if self.broken_at is None else f"broken at {self.broken_at:g}"
        doubts = f", {len(self.warnings)} warnings" if self.warnings else ""
        return f"<ProbeResult {what}: robust to {self.robust_to:g}, {broken} ({self.unit}), {self.status}{doubts}>"


@dataclass(frozen=True)
class ProbeStanding:
    """How a probe stands: `queued`, `running`, `done`, `failed` or `cancelled`, and what is known so far."""

    id: str
    status: str
    points: tuple[ProbePoint, ...] = ()
    result: ProbeResult | None = None
    error: IronclipError | None = None
    raw: Mapping[str, Any] = raw_field()

    @property
    def ended(self) -> bool:
        """Whether anything will still change."""
        return self.status in ENDS


@dataclass(frozen=True)
class ProbeSummary:
    """One probe of a list; `robust_to` and `broken_at` are what is known by now, in `unit`."""

    id: str
    status: str
    created: str
    started: str | None = None
    encoder: EncoderRef | None = None
    defence: Mapping[str, Any] | None = None
    label: str | None = None
    unit: str | None = None
    robust_to: float | None = None
    broken_at: float | None = None
    error: IronclipError | None = None
    raw: Mapping[str, Any] = raw_field()

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.status in ENDS


@dataclass(frozen=True)
class ProbeList:
    """Some of the probes that can be asked for, newest first.

    Attributes:
        next: path of the probes behind these; None where there are none.
        partial: the service's Redis is away, and those of other replicas are missing.
    """

    probes: tuple[ProbeSummary, ...]
    next: str | None = None
    partial: bool = False
    raw: Mapping[str, Any] = raw_field()

    @property
    def cursor(self) -> str | None:
        """What to pass on as `cursor` for the probes behind these; None where there are none."""
        query = urllib.parse.urlsplit(self.next or "").query
        return dict(urllib.parse.parse_qsl(query)).get("cursor")


@dataclass(frozen=True)
class ProbeEvent:
    """One event of a probe as it goes on; `kind` is `started`, `point`, `progress`, `artefacts`, or how it ended."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    id: int | None = None

    @property
    def ends(self) -> bool:
        """Whether it is the last one."""
        return self.kind in ENDS

    @property
    def point(self) -> ProbePoint | None:
        """The radius that it tells of, of a `point`."""
        return probe_point(self.data) if self.kind == "point" else None

    @property
    def result(self) -> ProbeResult | None:
        """The answer, of a `done`."""
        return probe_result(self.data) if self.kind == "done" else None

    @property
    def error(self) -> IronclipError | None:
        """Why it failed, of a `failed`."""
        return _error(self.data.get("error")) if self.kind == "failed" else None


def probe_point(data: object) -> ProbePoint:
    """Read one radius."""
    return pick(ProbePoint, data)


def probe_result(data: object, meta: Meta | None = None) -> ProbeResult:
    """Read what a probe found."""
    return pick(
        ProbeResult,
        data,
        own=EMPTY if meta is None else {"meta": meta},
        clean=lambda value: pick(ProbeClean, value),
        points=each(probe_point),
        warnings=tuple,
        encoder=encoder_ref,
        label_set=label_set_ref,
        preprocessing=preprocessing,
    )


def probe_cost(data: object) -> Mapping[str, Any]:
    """Read what a probe may cost."""
    cost = data.get("dry_run") if isinstance(data, Mapping) else None
    if not isinstance(cost, Mapping):
        raise UnexpectedAnswer("The answer does not say what the probe may cost; is this an Ironclip service?")
    return cost


def probe_standing(data: object) -> ProbeStanding:
    """Read how a probe stands."""
    return pick(ProbeStanding, data, points=each(probe_point), result=probe_result, error=_error)


def probe_list(data: object) -> ProbeList:
    """Read a list of probes."""
    return pick(
        ProbeList, data, probes=each(lambda value: pick(ProbeSummary, value, encoder=encoder_ref, error=_error))
    )


def _error(data: object) -> IronclipError:
    problem = Problem.parse(data)
    if problem is None:
        raise UnexpectedAnswer("A probe failed and did not say why.")
    return from_problem(problem)

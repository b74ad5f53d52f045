"""Requests of `/attack-probe` as pydantic reads them, and its answers as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from service.answer_schemas import DefenceRef, EncoderRef, LabelSetRef, PreprocessingRef, Problem
from service.schemas import Closed, Defence, ImageText, Options

# Checked by the library, which knows each attack's options; read as a defence is.
Attack = Defence
Artefact = Literal["adversarial", "perturbation"]


class ProbeFields(Options):
    """What a probe can be asked for, in every input form."""

    level: str | None = Field(
        default=None, description="The level of the tree that is attacked; the labels if not given."
    )
    label: str | None = Field(
        default=None, description="The true label; if not given, what the picture is answered with as it is."
    )
    target: str | None = Field(default=None, description="A label that must be reached; any other if not given.")
    objective: Literal["label", "embedding"] = Field(
        default="label", description="`embedding` attacks the vector itself, and needs no labels."
    )
    cosine_below: float | None = Field(
        default=None, ge=-1, le=0.999, description="The vector counts as broken below this cosine with itself; 0.5."
    )
    gallery: list[list[float]] | None = Field(
        default=None, description="Vectors; if given, the embedding counts as broken when its `top_k` nearest change."
    )
    top_k: int | None = Field(default=None, ge=1, le=10_000, description="Of the gallery; 1 if not given.")
    norm: Literal["linf", "l2"] = Field(default="linf", description="What bounds the perturbation.")
    eps: list[float] | None = Field(
        default=None,
        description="Radii: in 1/255 for `linf`, in pixel units (0 to 1, over the whole picture) for `l2`. If not "
        "given, the smallest one that breaks the decision is searched.",
    )
    max_eps: float | None = Field(default=None, gt=0, description="Upper end of the search: 16 for `linf`, 8 for `l2`.")
    effort: Literal["quick", "standard", "thorough"] = Field(
        default="quick", description="How hard each radius is attacked."
    )
    attack: Attack | None = Field(
        default=None,
        description="One attack in place of the effort's: its bare name, with no less than the effort has, or "
        '`{"name": ..., option: ...}`, taken as it is.',
    )
    seconds: float = Field(default=10.0, gt=0, description="Wall clock; what is known then is the answer.")
    gradients: int | None = Field(
        default=None,
        ge=1,
        description="Work at most, in gradient steps; a query without a gradient is a third of one. The effort's own "
        "if not given.",
    )
    draws: Literal["fixed", "fresh"] = Field(
        default="fixed", description="Of a defence that draws: the draws that are served, or new ones each time."
    )
    seed: int = Field(default=0, ge=0, le=1 << 53, description="Of the attack.")
    artefacts: list[Artefact] = Field(
        default_factory=list, description="Pictures to send along as PNG `data:` URIs, at `broken_at`."
    )
    dry_run: bool = Field(default=False, description="Only say what the probe may cost.")


class ProbeRequest(ProbeFields):
    """`POST /attack-probe` as JSON."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": "iVBORw0KGgo...", "labels": ["carrot", "rocket"], "max_eps": 8}]}
    )

    image: ImageText | None = Field(default=None, description="The picture.")

    @model_validator(mode="after")
    def _a_picture(self) -> ProbeRequest:
        if self.image is None:
            raise ValueError("give an image")
        return self


class ProbePoint(Closed):
    """What is known of one radius."""

    model_config = ConfigDict(extra="allow")

    eps: float
    broken: bool | None = Field(description="null: not decided before the probe ended.")
    state: Literal["waiting", "running", "broken", "held", "unknown"]
    steps: int
    gradients: int
    score_of_label: float | None = Field(default=None, description="The lowest score of the label that was seen.")
    cosine: float | None = Field(default=None, description="The lowest cosine with the clean vector that was seen.")
    label: str | None = Field(default=None, description="What that picture is answered with, or nearly so.")
    score: float | None = None
    attack: str | None = Field(default=None, description="The attack that broke it.")
    part: str | None = Field(default=None, description="Which part of it, where it is AutoAttack.")


class ProbeClean(Closed):
    """The decision about the picture as it is."""

    model_config = ConfigDict(extra="allow")

    label: str | None = None
    score: float | None = None
    margin: float | None = Field(default=None, description="The label's logit minus the next one's.")
    correct: bool | None = None


class ProbeAnswer(Closed):
    """What a probe found. Empirical: not a certificate."""

    model_config = ConfigDict(extra="allow")

    status: Literal["complete", "budget_exhausted"]
    statement: str
    objective: Literal["label", "embedding"]
    clean: ProbeClean
    label: str | None
    target: str | None
    norm: Literal["linf", "l2"]
    unit: str
    resolution: int
    points: list[ProbePoint]
    robust_to: float = Field(description="The largest radius below broken_at at which every attack failed.")
    broken_at: float | None = Field(description="The smallest radius that broke it; null if none did.")
    effort: str
    attack: dict[str, Any]
    cost: dict[str, float]
    warnings: list[dict[str, str]]
    artefacts: dict[str, Any] | None = None
    encoder: EncoderRef
    label_set: LabelSetRef | None
    level: str | None
    defence: DefenceRef
    preprocessing: PreprocessingRef


class ProbeStarted(Closed):
    """A probe that goes on by itself."""

    id: str
    status: str
    events: str


class ProbeStanding(Closed):
    """How a probe stands."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    points: list[ProbePoint]
    result: ProbeAnswer | None
    error: Problem | None


class ProbeSummary(Closed):
    """One probe of a list."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    created: str = Field(description="When it was asked for (ISO 8601, UTC).")
    started: str | None = Field(description="When it began to run; null while it waits.")
    encoder: EncoderRef | None = Field(description="Whose decision is attacked.")
    defence: DefenceRef | None
    label: str | None = Field(description="What is attacked, once it has begun; null for a vector.")
    unit: str | None = Field(description="Of the radii, once it has begun.")
    robust_to: float | None = Field(description="As far as is known.")
    broken_at: float | None = Field(description="As far as is known; null if nothing broke it.")
    error: Problem | None = Field(description="Why it failed.")


class ProbeList(Closed):
    """The answer of `GET /probes`."""

    probes: list[ProbeSummary]
    next: str | None = Field(default=None, description="Path of the probes behind these, where there are more.")
    partial: bool = Field(description="Redis is away: those of other replicas are missing.")

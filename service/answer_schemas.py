"""Answers as the OpenAPI document shows them.

On the hot path they are built as plain dicts; a test holds those to the models here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from service.schemas import Closed, Labels, Templates, Tree
from service.vector_forms import EmbedDtype


class Fault(Closed):
    """One fault of a request."""

    pointer: str = Field(description="JSON Pointer to the part at fault; empty for the whole body.")
    code: str
    detail: str


class Problem(Closed):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems/image-invalid",
                    "title": "The image cannot be decoded",
                    "status": 422,
                    "detail": "The PNG is truncated.",
                    "code": "image-invalid",
                    "instance": "urn:request:0af7651916cd43dd8448eb211c80319c",
                    "errors": [{"pointer": "/image", "code": "image-invalid", "detail": "The PNG is truncated."}],
                }
            ]
        }
    )

    type: str = Field(description="`/problems/{code}`, where the service explains it.")
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable name of the error.")
    instance: str | None = None
    errors: list[Fault] | None = None
    limit: float | None = None
    limit_name: str | None = None
    retry_after_ms: int | None = None


class Prediction(Closed):
    """One label of the answer."""

    label: str
    score: float = Field(description="Softmax over all labels at the encoder's own logit scale.")
    cosine: float = Field(description="Cosine between the image and the label's text weights.")


class LevelPrediction(Closed):
    """One node of an upper level."""

    label: str
    score: float


class EncoderRef(Closed):
    """Which encoder answered, exactly."""

    name: str
    digest: str
    dtype: str
    head: str


class LabelSetRef(Closed):
    """Which labels were used, exactly."""

    digest: str
    name: str | None = None


class PreprocessingRef(Closed):
    """How the picture became pixels."""

    digest: str
    warnings: list[str] = Field(description="What was done to this picture that a viewer may not expect.")


class DefenceRef(Closed):
    """Which defence stood in the decision, with its options."""

    model_config = ConfigDict(extra="allow")

    name: str


class DomainRef(Closed):
    """Whether the picture is of the kind the encoder was trained on."""

    inside: bool
    score: float = Field(description="About 1 for a typical training picture, towards 0 far away.")
    threshold: float = Field(description="Scores below it are outside.")
    description: str = Field(description="What the encoder was trained on.")
    warning: str | None = None


class Classification(Closed):
    """The answer for one image."""

    predictions: list[Prediction]
    levels: dict[str, list[LevelPrediction]] | None = None
    encoder: EncoderRef
    label_set: LabelSetRef
    preprocessing: PreprocessingRef
    defence: DefenceRef
    domain: DomainRef | None = None


class Failed(Closed):
    """In the place of one item that could not be used."""

    error: Problem


class EmbeddedImage(Closed):
    """The embedding of one image."""

    embedding: list[float] | str
    warnings: list[str]


class EmbeddedText(Closed):
    """The embedding of one text."""

    embedding: list[float] | str


class EmbedResponse(Closed):
    """The answer of `POST /embed`; vectors in float32 and float16 have length 1, but for rounding."""

    encoder: EncoderRef
    dim: int
    embed_dtype: EmbedDtype
    preprocessing: dict[str, str]
    defence: DefenceRef
    images: list[EmbeddedImage | Failed]
    texts: list[EmbeddedText | Failed]


class LabelSetSummary(Closed):
    """One label set in the list."""

    name: str
    digest: str
    read_only: bool


class LabelSetList(Closed):
    """The answer of `GET /label-sets`."""

    label_sets: list[LabelSetSummary]
    next: str | None = Field(default=None, description="Path of the sets behind these, where `limit` left some out.")


class LabelSetStored(LabelSetSummary):
    """One label set with its content in canonical form."""

    labels: Labels
    templates: Templates | None = None
    tree: Tree | None = None


class ModelVersion(Closed):
    """One version of an encoder, from the moment it is asked for."""

    role: Literal["stable", "canary", "coming", "leaving", "failed"]
    state: Literal["loading", "verifying", "warming", "ready", "draining", "failed"]
    share: float = Field(description="Of the requests that name no version.")
    since: str = Field(description="When it came into this state (ISO 8601, UTC).")
    digest: str | None = Field(description="Once it is loaded.")
    spec: str
    source: Literal["settings", "folder", "api"] = Field(description="Who brought it.")
    defence: DefenceRef
    requests_in_hand: int
    notes: list[str] = Field(description="What has not been verified.")
    failure: Problem | None = Field(description="Why it is not served.")


class ModelStanding(Closed):
    """How an encoder stands after a change."""

    name: str
    versions: list[ModelVersion]


class Sample(Closed):
    """A picture that ships with the service."""

    name: str
    label: str = Field(description="What it shows.")
    url: str = Field(description="Its path below the service's root.")
    credit: str = Field(description="Whose work it is.")
    licence: str = Field(description="SPDX identifier.")


class SampleList(Closed):
    """The answer of `GET /samples`."""

    samples: list[Sample]


class Status(Closed):
    """The answer of a health check."""

    status: str
    reason: str | None = None


class OpenAIEmbedding(Closed):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIEmbeddingResponse(Closed):
    """OpenAI's answer to an embedding request."""

    object: Literal["list"]
    model: str
    data: list[OpenAIEmbedding]
    usage: dict[str, int]

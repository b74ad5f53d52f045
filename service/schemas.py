"""Requests as pydantic reads them, and as the OpenAPI document shows them.

Label sets, trees and defences are checked by the library, which knows their rules; here they only have a JSON
schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from service.vector_forms import EmbedDtype

_TEXTS = {"type": "array", "items": {"type": "string"}}
_LABEL = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "prompts": _TEXTS, "descriptions": _TEXTS},
            "required": ["name"],
            "additionalProperties": False,
        },
    ]
}
_TREE = {
    "type": "object",
    "properties": {
        "levels": {**_TEXTS, "description": "Names of the levels, the labels' own level first."},
        "parents": {"type": "object", "additionalProperties": {"type": "string"}},
        "prompts": {"type": "object", "additionalProperties": _TEXTS},
    },
    "required": ["parents"],
    "additionalProperties": False,
}

# What the settings allow is checked by the routes. These bounds lie above what anybody sets and are there so that
# pydantic makes no objects of what nobody means; the schema leaves them out, since the settings' ones bind.
_MOST_LABELS, _MOST_IMAGES, _MOST_TEXTS = 1_000_000, 4096, 65_536

Labels = Annotated[
    list[Any], Field(max_length=_MOST_LABELS), WithJsonSchema({"type": "array", "items": _LABEL, "minItems": 1})
]
Templates = Annotated[
    list[Any] | str,
    WithJsonSchema({"anyOf": [{"type": "string"}, {**_TEXTS, "minItems": 1}]}),
]
Tree = Annotated[
    dict[str, Any] | str,
    WithJsonSchema({"anyOf": [{"type": "string"}, _TREE, {"type": "object", "additionalProperties": _TREE}]}),
]
Defence = Annotated[
    dict[str, Any] | str,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": True,
                },
            ]
        }
    ),
]
_PICTURE = (
    "JPEG, PNG or WebP as base64, or as a base64 `data:` URI; or its `https` URL, where the service fetches from that "
    "host (`IRONCLIP_IMAGE_URL_HOSTS`; by default from none)."
)
ImageText = Annotated[str, Field(description=_PICTURE)]
_IMAGE_TEXT = {"type": "string", "description": _PICTURE}
ImageTexts = Annotated[
    list[ImageText], Field(max_length=_MOST_IMAGES), WithJsonSchema({"type": "array", "items": _IMAGE_TEXT})
]
Texts = Annotated[list[str], Field(max_length=_MOST_TEXTS), WithJsonSchema(_TEXTS)]
LevelMode = Literal["rollup", "prompts"]
EncodingFormat = Literal["float", "base64"]


class Closed(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class Decision(Closed):
    """How a picture is to be decided about, whichever encoder does it."""

    labels: Labels | None = Field(
        default=None, description='The labels to choose from: names, or `{"name", "prompts"?, "descriptions"?}`.'
    )
    label_set: str | None = Field(
        default=None, description="A registered label set: `name`, or `name@digest` for one version."
    )
    defence: Defence | None = Field(
        default=None,
        description='`{"name": ..., option: ...}`, or the bare name; by default the encoder\'s own, see `GET /models`.',
    )
    templates: Templates | None = Field(
        default=None, description="Prompt templates with `{}` for the name, or the name of a known list of them."
    )
    tree: Tree | None = Field(
        default=None, description="A label tree over the labels, lines of `child parent`, or several trees by name."
    )
    levels: LevelMode | None = Field(
        default=None,
        description="How upper levels are scored: the sum of their labels' probabilities, or their own prompts. "
        "Without `tree`, the tree registered with the label set is used.",
    )
    top_k: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Predictions in each answer at most; 100 if not given."
    )


class Options(Decision):
    """What a classification can be asked for, in every input form."""

    encoder: str = Field(
        default="default", description="An encoder of `GET /models`: `name`, or `name@digest` for one version."
    )


class ClassifyRequest(Options):
    """`POST /classify` as JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"image": "iVBORw0KGgo...", "labels": ["carrot", "rocket", "cat face"], "top_k": 2}]
        }
    )

    image: ImageText | None = Field(default=None, description="One image; the answer is one object.")
    images: ImageTexts | None = Field(
        default=None, description="Several images (64 if not set otherwise); the answer is a list, in order."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> ClassifyRequest:
        if (self.image is None) == (self.images is None):
            raise ValueError("give exactly one of image and images")
        return self


class EmbedOptions(Closed):
    """What an embedding can be asked for, in every input form."""

    encoder: str = Field(
        default="default", description="An encoder of `GET /models`: `name`, or `name@digest` for one version."
    )
    encoding_format: EncodingFormat = Field(
        default="float", description="In a JSON answer: numbers, or base64 of little-endian ones of `embed_dtype`."
    )
    embed_dtype: EmbedDtype = Field(
        default="float32",
        description="Type of the numbers. `int8`: each vector times what makes its largest number, in magnitude, 127; "
        "cosines stay but for rounding, lengths do not. `binary`: the signs as unsigned bytes, 1 for a number above 0, "
        "the first in the highest bit, the last byte filled up with 0: `dim` / 8 of them, rounded up.",
    )
    defence: Defence | None = Field(
        default=None,
        description="Of the pictures, as for a classification; one that reads the labels needs `label_set`. By "
        "default the encoder's own where it does without labels, else none.",
    )
    label_set: str | None = Field(
        default=None, description="A registered label set, for a defence whose vector depends on the labels."
    )
    truncate: bool = Field(
        default=False, description="Cut texts longer than the encoder reads instead of refusing them."
    )
    texts: Texts = Field(default_factory=list)


class EmbedRequest(EmbedOptions):
    """`POST /embed` as JSON."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["a photo of a cat"], "images": []}]})

    images: ImageTexts = Field(default_factory=list)

    @model_validator(mode="after")
    def _something(self) -> EmbedRequest:
        if not self.images and not self.texts:
            raise ValueError("give images, texts, or both")
        return self


class LabelSetDocument(Closed):
    """A label set as it is registered."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"labels": ["cat", "dog"]}]})

    labels: Labels
    templates: Templates | None = None
    tree: Tree | None = None


class ModelDocument(Closed):
    """A version of an encoder that is to be loaded."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"spec": "/models/robust-v2", "canary": 0.05}]})

    spec: str = Field(
        min_length=1,
        max_length=4096,
        description="What to load: the path of an artifact below `IRONCLIP_MODELS_DIR`, a demo encoder, or what "
        "`IRONCLIP_MODEL_SPECS` allows.",
    )
    digest: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The encoder's digest (`GET /models`); another one is refused, and one that is served already is "
        "not loaded again.",
    )
    defence: Defence | None = Field(
        default=None, description="Of requests that name none; that of the version before if not given."
    )
    canary: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the name's requests that this version is tried on, beside the one that is served.",
    )


class OpenAIEmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`; fields of OpenAI's that mean nothing here are passed over."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"model": "default", "input": ["a photo of a cat"]}]}
    )

    input: Annotated[
        Any,
        WithJsonSchema(
            {
                "description": "A text, an image as a `data:` URI, or a list of them; also OpenAI's "
                "`text` and `image_url` parts, whose URL is a `data:` URI, or `https` where the service fetches it.",
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}, "minItems": 1},
                ],
            }
        ),
    ]
    model: str = "default"
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = Field(default=None, ge=1)

"""The Open Inference Protocol's requests as pydantic reads them, and its answers as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import from_json

from service.schemas import Closed, Decision

# More dimensions, tensors or characters than anybody means: pydantic is to make no objects of them.
_MOST_DIMENSIONS, _MOST_TENSORS, _MOST_CHARACTERS = 8, 16, 256
# What begins like this is JSON within a text: the protocol's parameters are texts, numbers and booleans.
_AS_TEXT = {"labels": "[", "templates": "[", "tree": "{", "defence": "{"}

Dimension = Annotated[int, Field(ge=0, le=2**64 - 1)]
Name = Annotated[str, Field(max_length=_MOST_CHARACTERS)]
TensorData = Annotated[
    list[Any],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}, {"type": "array"}]},
            "description": "The elements in row-major order, flat or nested as the shape says. BYTES are texts; an "
            "image is its file as base64.",
        }
    ),
]


class InferParameters(Decision):
    """What a classification can be asked for; lists and objects may also be given as JSON within a text."""

    truncate: bool = Field(default=False, description="Cut texts longer than the encoder reads.")
    binary_data_output: bool = Field(
        default=False, description="Outputs come as binary data unless their own `binary_data` says otherwise."
    )

    @field_validator(*_AS_TEXT, mode="before")
    @classmethod
    def _read_text(cls, value: object, info: Any) -> object:
        if isinstance(value, str) and value.lstrip().startswith(_AS_TEXT[info.field_name]):
            try:
                return from_json(value)
            except ValueError:
                raise ValueError("the text looks like JSON and is not") from None
        return value


class InputParameters(Closed):
    """Of one input tensor."""

    binary_data_size: int | None = Field(
        default=None, ge=0, description="Bytes of this tensor behind the JSON (binary tensor data extension)."
    )
    content_type: Name | None = Field(default=None, description="A hint of some clients; not needed, and not read.")


class OutputParameters(Closed):
    """Of one output tensor."""

    binary_data: bool | None = Field(default=None, description="Whether it comes as binary data.")


class InferInput(Closed):
    """One input tensor: `images`, `pixels`, `texts` or `labels`."""

    name: Name
    shape: list[Dimension] = Field(max_length=_MOST_DIMENSIONS)
    datatype: Name
    parameters: InputParameters | None = None
    data: TensorData | None = None


class InferOutput(Closed):
    """One output that is asked for."""

    name: Name
    parameters: OutputParameters | None = None


class InferRequest(Closed):
    """`POST /v2/models/{model}/infer` as JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgo..."]}],
                    "parameters": {"labels": ["carrot", "rocket", "cat face"]},
                }
            ]
        }
    )

    id: Name | None = Field(default=None, description="Comes back in the answer.")
    model_name: Name | None = Field(default=None, description="Not read: the path names the model.")
    model_version: Name | None = Field(default=None, description="Not read: the path names the version.")
    parameters: InferParameters | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=_MOST_TENSORS)
    outputs: list[InferOutput] | None = Field(default=None, max_length=4 * _MOST_TENSORS)


class ResponseOutput(Closed):
    """One tensor of the answer."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: TensorData | None = None


class InferResponse(Closed):
    """The answer of an inference."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any] = Field(description="Which encoder, labels, defence and preprocessing decided.")
    outputs: list[ResponseOutput]


class ServerMetadata(Closed):
    """The answer of `GET /v2`."""

    name: str
    version: str
    extensions: list[str]


class MetadataTensor(Closed):
    """What is known of a tensor beforehand; -1 is any number."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None


class ModelMetadata(Closed):
    """The answer of `GET /v2/models/{model}`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[MetadataTensor]
    outputs: list[MetadataTensor]
    parameters: dict[str, Any] | None = None


class ModelNames(Closed):
    """The answer of `GET /v2/models`."""

    models: list[str]


class Live(Closed):
    """The answer of `GET /v2/health/live`."""

    live: bool


class Ready(Closed):
    """The answer of `GET /v2/health/ready`; the specification's example calls it `live`, so both are there."""

    ready: bool
    live: bool


class ModelReady(Closed):
    """The answer of `GET /v2/models/{model}/ready`."""

    name: str
    ready: bool


class OipError(BaseModel):
    """An error, as the protocol has it."""

    model_config = ConfigDict(extra="forbid")

    error: str

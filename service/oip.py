"""What a request of the Open Inference Protocol means, and its answer as tensors.

Each served encoder is a model. Pictures come as files (`images`) or as the encoder's own pixels (`pixels`, to which no
preprocessing is applied); what decides about them is the same plan and the same Classifier as in `/classify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic_core import to_json

from ironclip.errors import ImageInvalid, OptionError
from ironclip.preprocessing import to_float
from service.container import ImageLimits
from service.errors import RequestInvalid
from service.forms import Picture, parse_json, picture_from_bytes, picture_from_text
from service.images import pixels_digest
from service.oip_schemas import InferParameters, InferRequest
from service.schemas import Decision, Options
from service.tensors import Wire, read_inputs, read_numbers, read_texts, split_body

INPUTS = ("images", "pixels", "texts", "labels")
# What says how a classification is made; without labels there is none.
_OF_CLASSIFICATIONS = ("templates", "tree", "levels", "top_k")


@dataclass(frozen=True)
class Limits:
    """How much one request may hold."""

    image: ImageLimits
    images: int
    texts: int
    labels: int


@dataclass(frozen=True)
class Inference:
    """A request, taken apart and checked.

    Attributes:
        request: as it was sent, without its tensors' data.
        parameters: its parameters, or the defaults.
        pictures: in order; one that cannot be used has its error.
        prepared: the pictures came as pixels.
        texts: in order.
        options: how to classify, where labels are given.
        size: bytes that the options take as JSON, in whichever form they came.
    """

    request: InferRequest
    parameters: InferParameters
    pictures: list[Picture]
    prepared: bool
    texts: list[str]
    options: Options | None
    size: int

    def binary(self, name: str) -> bool:
        """Whether an output is to come as binary data."""
        for output in self.request.outputs or ():
            if output.name == name and output.parameters is not None and output.parameters.binary_data is not None:
                return output.parameters.binary_data
        return self.parameters.binary_data_output


def read_inference(body: bytes, header: str | None, encoder: str, resolution: int, limits: Limits) -> Inference:
    """Read a request for an encoder; blocks.

    Raises:
        BodyMalformed, RequestInvalid, InputTooLarge: as their names say.
        ImageInvalid: pixels that no picture has.
    """
    text, binary = split_body(body, header)
    request = parse_json(text, InferRequest)
    wires = read_inputs(request.inputs, binary)
    for tensor in request.inputs:
        tensor.data = None  # the wires have it; the request is kept until the answer
    for name in wires:
        if name not in INPUTS:
            raise RequestInvalid(f"There is no input {name[:60]!r}; there are: {', '.join(INPUTS)}.")
    if "images" in wires and "pixels" in wires:
        raise RequestInvalid("Give the pictures as images or as pixels, not both.")
    pictures: list[Picture] = []
    if "images" in wires:
        pictures = _pictures(wires["images"], limits)
    elif "pixels" in wires:
        pictures = _prepared(wires["pixels"], resolution, limits.images)
    texts = _texts(wires["texts"], limits.texts) if "texts" in wires else []
    if not pictures and not texts:
        raise RequestInvalid("Give images, pixels or texts.")
    parameters = request.parameters or InferParameters()
    options = _options(parameters, wires.get("labels"), encoder, bool(pictures), limits.labels)
    # Not the JSON's length: that has the pictures in it, and has not what lies behind it.
    size = len(to_json(dict(options))) if options is not None else 0
    return Inference(request, parameters, pictures, "pixels" in wires, texts, options, size)


def wanted(inference: Inference, levels: Sequence[str], domain: bool) -> list[str]:
    """Names of the outputs, in order: those that are asked for, or what this request is answered with by default.

    Args:
        inference: the request.
        levels: levels of the label tree above the labels.
        domain: whether the encoder says what it was trained on.

    Raises:
        OptionError: an output is asked for twice, or is none of this request's.
    """
    known, default = [], []
    if inference.options is not None:
        ranked = inference.options.top_k is not None
        known += ["scores", "labels", "cosine", "top_labels", "top_scores"]
        default += ["top_labels", "top_scores"] if ranked else ["scores", "labels"]
        above = [f"{kind}:{name}" for name in levels for kind in ("level", "level_labels")]
        known += [*above, *(["domain_score"] if domain else [])]
        default += above
    if inference.pictures:
        known += ["embedding", "warnings"]
        default += [] if inference.options is not None else ["embedding"]
    if inference.texts:
        known.append("text_embedding")
        default.append("text_embedding")
    if not inference.request.outputs:
        return default
    asked = [output.name for output in inference.request.outputs]
    for i, name in enumerate(asked):
        if name not in known:
            raise OptionError(
                f"There is no output {name[:60]!r} of this request; there are: {', '.join(known)}.",
                pointer=f"/outputs/{i}/name",
            )
        if name in asked[:i]:
            raise OptionError(f"The output {name!r} is asked for twice.", pointer=f"/outputs/{i}/name")
    return asked


def shortened(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers from 0 up, at the seven significant digits that `/classify` writes: so both say the same float32."""
    large = values > 1e-290  # below, a power of ten would overflow, and float32 has 0 anyway
    safe = np.where(large, values, 1.0)
    scale = 10.0 ** (6 - np.floor(np.log10(safe)))
    result: NDArray[np.float64] = np.where(large, np.round(safe * scale) / scale, 0.0)
    return result


def _pictures(wire: Wire, limits: Limits) -> list[Picture]:
    pictures = []
    for i, value in enumerate(read_texts(wire, limits.images)):
        pointer = f"/images/{i}"
        if isinstance(value, str):
            pictures.append(picture_from_text(value, limits.image, pointer))
        else:
            pictures.append(picture_from_bytes(value, None, limits.image, pointer))
    return pictures


def _prepared(wire: Wire, resolution: int, most: int) -> list[Picture]:
    """Pictures of pixels; float32 ones that are a 255th each are the uint8 ones, with their answers and their keys."""
    pictures = []
    for i, values in enumerate(read_numbers(wire, (3, resolution, resolution), most)):
        pointer = f"/pixels/{i}"
        if values.dtype == np.uint8:
            pixels = torch.from_numpy(values.copy())  # not a view, which would keep the whole body
        else:
            if not np.isfinite(values).all():
                raise ImageInvalid("A value is infinite or not a number.", pointer=pointer)
            if values.min() < 0 or values.max() > 1:
                raise ImageInvalid(
                    "FP32 pixels are from 0 to 1; values outside were sent. Send values up to 255 as UINT8.",
                    pointer=pointer,
                )
            pixels = torch.from_numpy(values.astype(np.float32, copy=True))
            whole = (pixels * 255).round().to(torch.uint8)
            if torch.equal(to_float(whole), pixels):
                pixels = whole
        digest = bytes.fromhex(pixels_digest(pixels))
        pictures.append(Picture(pointer=pointer, pixels=pixels, pixels_digest=digest))
    return pictures


def _texts(wire: Wire, most: int) -> list[str]:
    texts = []
    for i, value in enumerate(read_texts(wire, most)):
        if isinstance(value, str):
            texts.append(value)
            continue
        try:
            texts.append(value.decode())
        except UnicodeDecodeError:
            error = RequestInvalid("The text is not UTF-8.")
            error.pointer = f"/{wire.name}/{i}"
            raise error from None
    return texts


def _options(
    parameters: InferParameters, labels: Wire | None, encoder: str, pictures: bool, most: int
) -> Options | None:
    """How to classify, or None where no labels are given."""
    asked: dict[str, Any] = {name: getattr(parameters, name) for name in Decision.model_fields}
    if labels is not None:
        if parameters.labels is not None:
            raise RequestInvalid("Give the labels as an input or as a parameter, not both.")
        asked["labels"] = _texts(labels, most)
    if asked["labels"] is None and asked["label_set"] is None:
        idle = [name for name in _OF_CLASSIFICATIONS if asked[name] is not None]
        if idle:
            raise RequestInvalid(f"{idle[0]} is of a classification: give labels, or a label_set.")
        return None
    if not pictures:
        raise RequestInvalid("Labels are for pictures: give images or pixels, or leave the labels out.")
    return Options.model_construct(encoder=encoder, **asked)  # each field has been checked

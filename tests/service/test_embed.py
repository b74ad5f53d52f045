"""/embed and /v1/embeddings: unit vectors that are open_clip's, in every encoding, and for the `openai` package."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from ironclip.encoder import Encoder
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from tests.service.conftest import ServiceProcess, as_base64, picture


def uri(data: bytes) -> str:
    return "data:image/png;base64," + as_base64(data)


@pytest.fixture(scope="module")
def encoder(tiny_artifact: object) -> Encoder:
    return load_encoder(str(tiny_artifact))


def image_vector(encoder: Encoder, data: bytes) -> np.ndarray:
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    with torch.no_grad():
        return torch.nn.functional.normalize(encoder.encode_image(to_float(pixels[None])), dim=-1)[0].numpy()


def text_vector(encoder: Encoder, text: str) -> np.ndarray:
    with torch.no_grad():
        return torch.nn.functional.normalize(encoder.encode_text([text]), dim=-1)[0].numpy()


def from_base64(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_images_and_texts_in_one_call(client: httpx.Client, encoder: Encoder) -> None:
    data, texts = picture(1), ["a cat", "犬の写真"]
    answer = client.post("/embed", json={"images": [uri(data)], "texts": texts}).json()
    assert answer["dim"] == 32
    assert answer["encoder"]["digest"] == encoder.digest
    np.testing.assert_allclose(answer["images"][0]["embedding"], image_vector(encoder, data), atol=1e-5)
    for item, text in zip(answer["texts"], texts, strict=True):
        np.testing.assert_allclose(item["embedding"], text_vector(encoder, text), atol=1e-5)
        assert np.linalg.norm(item["embedding"]) == pytest.approx(1, abs=1e-5)


def test_base64_holds_the_same_numbers(client: httpx.Client) -> None:
    asked = {"images": [uri(picture(2))], "texts": ["a cat"]}
    numbers = client.post("/embed", json=asked).json()
    packed = client.post("/embed", json={**asked, "encoding_format": "base64"}).json()
    for kind in ("images", "texts"):
        vector = from_base64(packed[kind][0]["embedding"])
        np.testing.assert_allclose(vector, numbers[kind][0]["embedding"], atol=1e-7)


def test_every_form_of_input(client: httpx.Client) -> None:
    data = picture(3)
    wanted = client.post("/embed", json={"images": [uri(data)]}).json()
    as_form = client.post("/embed", files=[("images", ("x.png", data, "image/png"))])
    bare = client.post("/embed", params={"encoder": "tiny"}, content=data, headers={"content-type": "image/png"})
    assert as_form.json() == bare.json() == wanted
    assert bare.headers["cache-status"] == "ironclip; hit"


def test_each_item_has_its_own_outcome(client: httpx.Client) -> None:
    images = [uri(picture(4)), uri(picture(4)[:50])]
    answer = client.post("/embed", json={"images": images, "texts": ["fine", "", "many words " * 20]}).json()
    assert "embedding" in answer["images"][0]
    assert answer["images"][1]["error"]["code"] == "image-invalid"
    assert "embedding" in answer["texts"][0]
    assert [item["error"]["errors"][0]["pointer"] for item in answer["texts"][1:]] == ["/texts/1", "/texts/2"]


def test_a_long_text_is_refused_or_cut_as_asked(client: httpx.Client, encoder: Encoder) -> None:
    """Exactly the context, one token over, and cut."""
    fits = " ".join(["dog"] * (encoder.context_length - 2))
    over = fits + " dog"
    answer = client.post("/embed", json={"texts": [fits, over]}).json()["texts"]
    assert "embedding" in answer[0]
    assert answer[1]["error"]["limit"] == encoder.context_length
    cut = client.post("/embed", json={"texts": [fits, over, "short"], "truncate": True}).json()["texts"]
    np.testing.assert_allclose(cut[0]["embedding"], cut[1]["embedding"], atol=1e-6)
    np.testing.assert_allclose(cut[2]["embedding"], text_vector(encoder, "short"), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({}, 422),
        ({"texts": []}, 422),
        ({"texts": ["x"] * 1025}, 413),
        ({"texts": [1]}, 422),
        ({"texts": ["x"], "encoding_format": "hex"}, 422),
        ({"texts": ["x"], "encoder": "nope"}, 404),
    ],
)
def test_what_cannot_be_embedded(client: httpx.Client, asked: dict[str, object], status: int) -> None:
    assert client.post("/embed", json=asked).status_code == status


@pytest.fixture(scope="module")
def api(tiny_service: ServiceProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_service.url}/v1", api_key="unused", max_retries=0)


def test_the_openai_package_embeds_texts_and_images_in_one_input(api: openai.OpenAI, encoder: Encoder) -> None:
    data = picture(5)
    answer = api.embeddings.create(model="default", input=["a cat", uri(data), "a dog"])
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.model == "tiny"
    assert answer.usage.total_tokens == 2 * encoder.count_tokens("a cat")
    wanted = [text_vector(encoder, "a cat"), image_vector(encoder, data), text_vector(encoder, "a dog")]
    for item, vector in zip(answer.data, wanted, strict=True):
        np.testing.assert_allclose(item.embedding, vector, atol=1e-5)


def test_the_openai_package_asks_for_either_encoding(api: openai.OpenAI) -> None:
    packed = api.embeddings.create(model="tiny", input="a cat")  # base64 unless told otherwise
    numbers = api.embeddings.create(model="tiny", input="a cat", encoding_format="float", dimensions=32)
    np.testing.assert_allclose(packed.data[0].embedding, numbers.data[0].embedding, atol=1e-6)


def test_the_openai_package_lists_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("default").id == "tiny"


def test_image_url_parts_are_images(client: httpx.Client, encoder: Encoder) -> None:
    data = picture(6)
    parts = [{"type": "text", "text": "a cat"}, {"type": "image_url", "image_url": {"url": uri(data)}}]
    answer = client.post("/v1/embeddings", json={"input": parts}).json()
    np.testing.assert_allclose(answer["data"][1]["embedding"], image_vector(encoder, data), atol=1e-5)


def test_the_openai_package_understands_our_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.embeddings.create(model="gpt-9", input="x")
    assert missing.value.code == "encoder-not-found"
    for wrong, param in ((["fine", ""], "input.1"), ([uri(b"nonsense")], "input.0"), ([1, 2, 3], "input.0")):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            api.embeddings.create(model="tiny", input=wrong)  # type: ignore[arg-type]
        assert refused.value.param == param
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions"):
        api.embeddings.create(model="tiny", input="x", dimensions=8)
    with pytest.raises(openai.UnprocessableEntityError):
        api.embeddings.create(model="tiny", input=[])

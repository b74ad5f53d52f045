"""/embed and /v1/embeddings: unit vectors that are open_clip's, in every encoding, and for the `openai` package."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from ironclip.encoder import Encoder
from ironclip.errors import LabelError
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from service.app import create_app
from service.routes.embed import check_text
from service.settings import Settings
from service.vector_forms import converted
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


def test_numbers_of_other_types_keep_the_order_of_what_is_alike(client: httpx.Client) -> None:
    asked = {"images": [uri(picture(seed)) for seed in range(40, 46)], "texts": ["a cat"]}

    def vectors(dtype: str, encoding: str) -> np.ndarray:
        answer = client.post("/embed", json={**asked, "embed_dtype": dtype, "encoding_format": encoding}).json()
        assert answer["embed_dtype"] == dtype
        found = [item["embedding"] for item in answer["images"] + answer["texts"]]
        if encoding == "float":
            return np.array(found)
        letter = {"float32": "<f4", "float16": "<f2", "int8": "i1", "binary": "u1"}[dtype]
        return np.stack([np.frombuffer(base64.b64decode(one), letter) for one in found])

    exact = vectors("float32", "base64")
    for dtype in ("float32", "float16", "int8", "binary"):
        packed = vectors(dtype, "base64")
        if dtype == "float32":
            np.testing.assert_allclose(vectors(dtype, "float"), packed, atol=1e-7)
        else:  # the very same numbers
            np.testing.assert_array_equal(vectors(dtype, "float").astype(packed.dtype), packed)
        if dtype == "binary":
            np.testing.assert_array_equal(np.unpackbits(packed, axis=-1), exact > 0)
        else:
            near = packed.astype(float) / np.linalg.norm(packed.astype(float), axis=-1, keepdims=True)
            np.testing.assert_allclose(near @ near.T, exact @ exact.T, atol={"int8": 0.01}.get(dtype, 1e-3))
        if dtype == "int8":
            assert (np.abs(packed.astype(int)).max(axis=-1) == 127).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_all_vectors_as_one_numpy_file(client: httpx.Client, dtype: str) -> None:
    asked = {"images": [uri(picture(50)), uri(picture(51))], "texts": ["a cat"], "embed_dtype": dtype}
    wanted = client.post("/embed", json={**asked, "encoding_format": "base64"}).json()
    answer = client.post("/embed", json=asked, headers={"accept": "application/x-npy"})
    assert answer.headers["content-type"] == "application/x-npy"
    assert answer.headers["x-ironclip-encoder"] == f"tiny@{wanted['encoder']['digest']}"
    rows = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert rows.shape == (3, wanted["dim"] // 8 if dtype == "binary" else wanted["dim"])
    found = [base64.b64decode(item["embedding"]) for item in wanted["images"] + wanted["texts"]]
    assert [row.tobytes() for row in rows] == found
    bare = client.post("/embed", json=asked, headers={"accept": "application/octet-stream"})
    assert bare.headers["content-type"] == "application/octet-stream"
    assert bare.content == b"".join(found)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/x-npy, */*;q=0.1", "application/x-npy"),
        ("application/x-npy;q=0.2, application/json;q=0.1", "application/x-npy"),
        ("Application/Octet-Stream", "application/octet-stream"),
        ("", "application/json"),
        ("nonsense", "application/json"),
        (",", "application/json"),
        ("application/x-npy, nonsense", "application/x-npy"),
        ("nonsense, , text/html", None),
        ('a/b;"' + ";" * 30_000, None),
        ("text/html", None),
        ("application/json;q=0", None),
    ],
)
def test_accept_decides_about_the_form(client: httpx.Client, accept: str, form: str | None) -> None:
    answer = client.post("/embed", json={"texts": ["a cat"]}, headers={"accept": accept})
    if form is None:
        assert answer.status_code == 406
        assert answer.json()["code"] == "not-acceptable"
        assert "application/x-npy" in answer.json()["detail"] or "at most 1000" in answer.json()["detail"]
    else:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == form


def test_rows_cannot_hold_an_error(client: httpx.Client) -> None:
    asked = {"images": [uri(picture(4)), uri(picture(4)[:50])], "texts": ["fine", ""]}
    for part, pointer, code in (("images", "/images/1", "image-invalid"), ("texts", "/texts/1", "labels-invalid")):
        answer = client.post("/embed", json={part: asked[part]}, headers={"accept": "application/x-npy"})
        assert answer.status_code == 422
        assert answer.json()["code"] == code
        assert answer.json()["errors"][0]["pointer"] == pointer


def test_one_picture_and_a_text_that_cannot_be_used(client: httpx.Client) -> None:
    """In JSON each text has its own outcome, also beside a picture that is the body."""
    asked = {"params": {"texts": ["fine", ""]}, "content": picture(60), "headers": {"content-type": "image/png"}}
    answer = client.post("/embed", **asked).json()  # type: ignore[arg-type]
    assert "embedding" in answer["images"][0]
    assert "embedding" in answer["texts"][0]
    assert answer["texts"][1]["error"]["code"] == "labels-invalid"


def test_what_has_no_direction_stays_so() -> None:
    zero = np.zeros((2, 12), np.float32)
    assert not converted(zero, "int8").any()
    bits = converted(zero, "binary")
    assert bits.shape == (2, 2)  # the last byte is filled up
    assert not bits.any()


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


def test_to_cut_a_text_is_advised_only_where_that_can_be_asked_for(client: httpx.Client) -> None:
    over = "dog " * 40
    tensor = {"name": "texts", "datatype": "BYTES", "shape": [1], "data": [over]}
    with_option = {
        "/embed": client.post("/embed", json={"texts": [over]}).json()["texts"][0]["error"]["detail"],
        "/v2": client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).json()["error"],
    }
    without = {
        "/v1": client.post("/v1/embeddings", json={"input": over}).json()["error"]["message"],
        "/classify": client.post("/classify", json={"image": uri(picture(7)), "labels": [over]}).json()["detail"],
    }
    for detail in (*with_option.values(), *without.values()):
        assert "tokens" in detail, detail
    assert all("set truncate" in detail for detail in with_option.values()), with_option
    assert not any("truncate" in detail for detail in without.values()), without


@pytest.mark.parametrize("bad", ["\x00", "a\x00b", "a\x1bb", "a\x7fb", "a\x9fb", "", " \u200b", "\u202e\u200d"])
def test_a_text_that_no_label_could_be_is_refused(client: httpx.Client, bad: str) -> None:
    label = client.post("/classify", json={"image": uri(picture(8)), "labels": ["a", bad]}).json()
    embedded = client.post("/embed", json={"texts": ["fine", bad]}).json()["texts"]
    assert "embedding" in embedded[0]
    assert embedded[1]["error"]["detail"] == label["detail"]
    assert embedded[1]["error"]["errors"][0]["pointer"] == "/texts/1"
    answer = client.post("/v1/embeddings", json={"input": ["fine", bad]})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "input.1"
    assert label["detail"] in answer.json()["error"]["message"]


def test_a_text_may_have_several_lines_and_joined_emoji(client: httpx.Client, encoder: Encoder) -> None:
    """To a tokenizer a line break is a space; U+200D joins the emoji."""
    texts = ["a dog\r\non a\tlawn", "a dog on a lawn", "👩\u200d🌾 in a field"]
    found = [item["embedding"] for item in client.post("/embed", json={"texts": texts}).json()["texts"]]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[2], text_vector(encoder, texts[2]), atol=1e-5)


def test_characters_are_refused_as_in_labels() -> None:
    """All of the first plane, but for what ends a line or a column, which a label cannot hold."""
    for code in range(0x10000):
        text = f"a{chr(code)}b"
        try:
            LabelSet.parse([text])
            wanted = True
        except LabelError:
            wanted = text[1] in "\t\n\v\f\r"
        try:
            check_text(text, 3, "/texts/0")
            found = True
        except LabelError:
            found = False
        assert found is wanted, hex(code)


def test_tokens_are_counted_within_the_deadline(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def count_tokens(self: Encoder, text: str) -> int:
        counted.append(text)
        time.sleep(0.1)
        return 3

    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        texts = [f"text {i}" for i in range(100)]
        monkeypatch.setattr(Encoder, "count_tokens", count_tokens)
        answer = client.post("/v1/embeddings", json={"input": texts}, headers={"x-request-timeout-ms": "2000"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline-exceeded"
        time.sleep(1.7)  # the texts under way
        assert 0 < len(counted) <= 48


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({}, 422),
        ({"texts": []}, 422),
        ({"texts": ["x"] * 1025}, 413),
        ({"texts": [1]}, 422),
        ({"texts": ["x"], "encoding_format": "hex"}, 422),
        ({"texts": ["x"], "embed_dtype": "float8"}, 422),
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

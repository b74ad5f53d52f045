"""The Open Inference Protocol over plain HTTP: /classify's numbers as tensors, and a clear error for every lie."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from ironclip.classifier import Classifier, predict
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from service.app import create_app
from service.container import ImageLimits
from service.oip import Limits, read_inference, shortened
from service.routes.classify import _short
from service.settings import Settings
from tests.service.conftest import Locked, ServiceProcess, as_base64, metric, picture

LABELS = ["carrot", "rocket", "cat face"]
SIDE, DIM = 32, 32
URL = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def encoder(tiny_artifact: Path) -> Encoder:
    return load_encoder(str(tiny_artifact))


def tensor(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)] if shape is None else shape, "data": data}


def images(*files: bytes) -> dict[str, Any]:
    return tensor("images", "BYTES", [as_base64(data) for data in files])


def packed(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def binary(
    client: httpx.Client, tensors: list[tuple[str, str, list[int], bytes]], length: int | None = None, **rest: Any
) -> httpx.Response:
    """Ask with binary tensors; `length` in the place of the JSON's own."""
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        for name, kind, shape, data in tensors
    ]
    head = json.dumps({"inputs": inputs, **rest}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
    return client.post(URL, content=head + b"".join(data for *_, data in tensors), headers=headers)


def ask(client: httpx.Client, *inputs: dict[str, Any], outputs: list[str] | None = None, **parameters: Any) -> Any:
    body: dict[str, Any] = {"inputs": list(inputs), "parameters": parameters}
    if outputs is not None:
        body["outputs"] = [{"name": name} for name in outputs]
    return client.post(URL, json=body)


def outputs_of(response: httpx.Response) -> dict[str, Any]:
    """Outputs by name: arrays in their shape."""
    assert response.status_code == 200, response.text
    kinds = {"FP32": np.float32, "BYTES": object}
    return {
        output["name"]: np.array(output["data"], kinds[output["datatype"]]).reshape(output["shape"])
        for output in response.json()["outputs"]
    }


def pixels_of(encoder: Encoder, data: bytes) -> np.ndarray:
    return encoder.preprocessing(Image.open(io.BytesIO(data)))[0].numpy()


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]


def test_server_and_models_are_described(client: httpx.Client, encoder: Encoder) -> None:
    for path in ("/v2", "/v2/"):
        assert "binary_tensor_data" in client.get(path).json()["extensions"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    assert client.get("/v2/models").json() == {"models": ["tiny"]}
    version = encoder.digest[:12]
    models = ["tiny", "default", f"tiny/versions/{version}", f"default/versions/{encoder.digest}"]
    answers = [client.get(f"/v2/models/{model}").json() for model in models]
    assert answers == [answers[0]] * 4
    assert answers[0]["versions"] == [version]
    assert not client.get("/v2/models/tiny?version=other").is_error  # a version is part of the path, or is none
    assert "domain_score" not in [one["name"] for one in answers[0]["outputs"]]
    inputs = {one["name"]: one for one in answers[0]["inputs"]}
    assert inputs["pixels"]["shape"] == [-1, 3, SIDE, SIDE]
    assert "No preprocessing" in inputs["pixels"]["parameters"]["description"]
    assert client.get(f"/v2/models/default/versions/{version}/ready").json() == {"name": "tiny", "ready": True}
    for path in ("no", "tiny/versions/1", "no/ready", "tiny/versions/1/ready", "no/infer"):
        refused(client.get(f"/v2/models/{path}"), 405 if path.endswith("infer") else 404)


def test_scores_are_those_of_classify_to_the_bit(client: httpx.Client) -> None:
    files = [picture(i) for i in range(5)]
    native = client.post("/classify", json={"images": list(map(as_base64, files)), "labels": LABELS}).json()
    rows = [{row["label"]: row["score"] for row in one["predictions"]} for one in native]
    cosines = [{row["label"]: row["cosine"] for row in one["predictions"]} for one in native]
    answer = ask(client, images(*files), labels=LABELS, outputs=["labels", "scores", "cosine"])
    found = outputs_of(answer)
    assert found["labels"].tolist() == LABELS
    wanted = np.array([[row[label] for label in LABELS] for row in rows], np.float32)
    assert np.array_equal(found["scores"], wanted)
    assert answer.headers["cache-status"] == "ironclip; hit"  # the same plan, the same pictures
    np.testing.assert_allclose(found["cosine"], [[row[label] for label in LABELS] for row in cosines], rtol=1e-6)
    parameters = answer.json()["parameters"]
    assert parameters["label_set_digest"] == native[0]["label_set"]["digest"]
    assert parameters["encoder_digest"] == native[0]["encoder"]["digest"]
    assert parameters["preprocessing"] == native[0]["preprocessing"]["digest"]
    assert all(isinstance(value, (str, int, float)) for value in parameters.values())


@given(st.lists(st.floats(0, 1) | st.floats(0, 1e-12), min_size=1, max_size=20))
@settings(deadline=None, database=None)
def test_numbers_are_shortened_as_classify_shortens_them(values: list[float]) -> None:
    ours = shortened(np.array(values)).astype(np.float32)
    assert np.array_equal(ours, np.array([_short(value) for value in values], np.float32))


def test_options_mean_what_they_mean_to_classify(client: httpx.Client) -> None:
    tree = {"levels": ["name", "kind"], "parents": {"carrot": "thing", "rocket": "thing", "cat face": "animal"}}
    options = {"labels": LABELS, "templates": ["a {}", "one {}"], "tree": tree, "levels": "rollup", "top_k": 2}
    native = client.post("/classify", json={"image": as_base64(picture(7)), **options}).json()
    as_texts = {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in options.items()}
    for given_as in (options, as_texts):  # the protocol's own parameters are texts, numbers and booleans
        found = outputs_of(ask(client, images(picture(7)), **given_as))
        assert list(found) == ["top_labels", "top_scores", "level:kind", "level_labels:kind"]
        assert found["top_labels"].tolist() == [[row["label"] for row in native["predictions"]]]
        assert np.array_equal(found["top_scores"][0], np.float32([row["score"] for row in native["predictions"]]))
        levels = dict(zip(found["level_labels:kind"], found["level:kind"][0], strict=True))
        assert levels == {row["label"]: np.float32(row["score"]) for row in native["levels"]["kind"]}


def test_a_defence_decides_and_a_registered_set_is_found(client: httpx.Client) -> None:
    assert client.put("/label-sets/oip", json={"labels": [*LABELS, "boat"]}).status_code == 201
    options = {"label_set": "oip", "defence": {"name": "cola", "views": 2}, "top_k": 3}
    native = client.post("/classify", json={"image": as_base64(picture(8)), **options}).json()
    answer = ask(client, images(picture(8)), **options)
    found = outputs_of(answer)
    assert found["top_labels"][0].tolist() == [row["label"] for row in native["predictions"]]
    assert json.loads(answer.json()["parameters"]["defence"]) == native["defence"]
    assert answer.json()["parameters"]["label_set_name"] == "oip"
    assert client.delete("/label-sets/oip").status_code == 204


def test_embeddings_are_those_of_embed(client: httpx.Client) -> None:
    texts = ["a cat", "犬の写真"]
    native = client.post("/embed", json={"images": [as_base64(picture(9))], "texts": texts}).json()
    found = outputs_of(ask(client, images(picture(9)), tensor("texts", "BYTES", [[t] for t in texts], [2, 1])))
    assert list(found) == ["embedding", "text_embedding"]
    assert found["embedding"].shape == (1, DIM)
    np.testing.assert_allclose(found["embedding"][0], native["images"][0]["embedding"], atol=1e-8)
    for row, item in zip(found["text_embedding"], native["texts"], strict=True):
        np.testing.assert_allclose(row, item["embedding"], atol=1e-8)
    both = outputs_of(ask(client, images(picture(9)), labels=LABELS, outputs=["embedding", "scores", "warnings"]))
    assert np.array_equal(both["embedding"], found["embedding"])
    assert both["scores"].shape == (1, 3)
    assert both["warnings"].shape == (1,)


def test_pixels_are_decided_about_as_they_are(client: httpx.Client, encoder: Encoder) -> None:
    values = np.stack([pixels_of(encoder, picture(i)) for i in (11, 12)])
    floats = values.astype(np.float32) / 255
    labels = ("labels", "BYTES", [3], packed(*(label.encode() for label in LABELS)))
    from_files = outputs_of(ask(client, images(picture(11), picture(12)), labels=LABELS))["scores"]
    for kind, data in (("UINT8", values), ("FP32", floats)):
        answer = binary(client, [labels, ("pixels", kind, list(data.shape), data.tobytes())])
        assert np.array_equal(outputs_of(answer)["scores"], from_files), kind
        assert answer.json()["parameters"]["preprocessing"] == "none"
        as_json = ask(client, tensor("pixels", kind, data.ravel().tolist(), list(data.shape)), labels=LABELS)
        assert np.array_equal(outputs_of(as_json)["scores"], from_files), kind
    # Between the steps of 8 bits: the Classifier on just these values, not on rounded ones.
    between = np.clip(floats + np.float32(0.4 / 255), 0, 1)
    found = outputs_of(binary(client, [labels, ("pixels", "FP32", list(between.shape), between.tobytes())]))["scores"]
    classifier = Classifier(encoder, LabelSet.parse(LABELS))
    wanted = predict(classifier, torch.from_numpy(between)).logits.softmax(-1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - from_files).max() > 1e-6
    # Both kinds in one batch, where one picture of floats is one of 8 bits after all.
    mixed = np.stack([floats[0], between[1]])
    rows = outputs_of(binary(client, [labels, ("pixels", "FP32", list(mixed.shape), mixed.tobytes())]))["scores"]
    np.testing.assert_allclose(rows, [from_files[0], found[1]], atol=1e-6)


def test_kinds_of_pixels_are_encoded_apart_within_one_batch(client: httpx.Client, encoder: Encoder) -> None:
    random = np.random.default_rng(17)
    values = random.random((6, 3, SIDE, SIDE), np.float32)
    values[::2] = random.integers(0, 256, (3, 3, SIDE, SIDE)).astype(np.float32) / 255
    found = outputs_of(binary(client, [("pixels", "FP32", list(values.shape), values.tobytes())]))["embedding"]
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(encoder.encode_image(torch.from_numpy(values)), dim=-1)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_pixels_are_no_file_to_the_caches(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    name = 'ironclip_cache_total{cache="images",result="miss"}'
    before = metric(tiny_service.url, name)
    values = np.random.default_rng(3).random((1, 3, SIDE, SIDE), np.float32)
    asked = [("pixels", "FP32", list(values.shape), values.tobytes())]
    first = binary(client, asked, parameters={"labels": LABELS})
    again = binary(client, asked, parameters={"labels": LABELS})
    assert (first.headers["cache-status"], again.headers["cache-status"]) == ("ironclip; fwd=miss", "ironclip; hit")
    assert first.json()["outputs"] == again.json()["outputs"]
    assert metric(tiny_service.url, name) == before
    # The bytes of these floats read as a picture of 8 bits are another picture, under another key.
    other = np.frombuffer(values.tobytes()[: 3 * SIDE * SIDE], np.uint8).reshape(values.shape)
    answer = binary(client, [("pixels", "UINT8", list(other.shape), other.tobytes())], parameters={"labels": LABELS})
    assert answer.headers["cache-status"] == "ironclip; fwd=miss"


def test_binary_outputs_hold_the_numbers_of_the_json_ones(client: httpx.Client) -> None:
    asked = {"inputs": [images(picture(13))], "id": "42", "parameters": {"labels": LABELS}}
    plain = outputs_of(client.post(URL, json=asked))
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "labels"}]
    one = client.post(URL, json={**asked, "outputs": outputs})
    assert one.headers["content-type"] == "application/octet-stream"
    length = int(one.headers["inference-header-content-length"])
    head, data = json.loads(one.content[:length]), one.content[length:]
    assert head["id"] == "42"
    assert head["outputs"][0]["parameters"] == {"binary_data_size": len(data)}
    assert np.array_equal(np.frombuffer(data, "<f4"), plain["scores"][0])
    assert head["outputs"][1]["data"] == LABELS
    every = client.post(URL, json={**asked, "parameters": {"labels": LABELS, "binary_data_output": True}})
    assert every.content.endswith(packed(*(label.encode() for label in LABELS)))
    without = client.post(URL, json={"inputs": asked["inputs"]}).json()
    assert without["id"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([tensor("images", "FP32", [0.5])], ["images", "BYTES"]),
        ([tensor("images", "BYTES", ["x"], [1, 2])], ["images", "[N] or [N, 1]"]),
        ([tensor("images", "BYTES", ["x"], [2])], ["2 elements"]),
        ([tensor("images", "BYTES", [], [0])], ["at least one"]),
        ([tensor("images", "BYTES", [1])], ["images[0]", "base64"]),
        ([tensor("images", "BYTES", ["####"])], ["images[0]", "base64"]),
        ([images(picture(1), picture(2)[:60], picture(3))], ["images[1]", "PNG"]),
        ([images(picture(1)), images(picture(1))], ["twice"]),
        ([images(picture(1)), tensor("pixels", "UINT8", [0], [1])], ["not both"]),
        ([tensor("picture", "BYTES", ["x"])], ["images, pixels, texts, labels"]),
        ([tensor("labels", "BYTES", ["x"])], ["images, pixels or texts"]),
        ([tensor("pixels", "INT8", [0] * 3072, [1, 3, 32, 32])], ["UINT8 or FP32"]),
        ([tensor("pixels", "UINT8", [0] * 3072, [3, 32, 32])], ["[N, 3, 32, 32]"]),
        ([tensor("pixels", "UINT8", [0] * 3072, [1, 32, 32, 3])], ["[N, 3, 32, 32]"]),
        ([tensor("pixels", "UINT8", [0] * 3071, [1, 3, 32, 32])], ["3072 elements"]),
        ([tensor("pixels", "UINT8", [256] * 3072, [1, 3, 32, 32])], ["0 to 255"]),
        ([tensor("pixels", "UINT8", [True] * 3072, [1, 3, 32, 32])], ["a boolean"]),
        ([tensor("pixels", "UINT8", [0.5] * 3072, [1, 3, 32, 32])], ["a fraction"]),
        ([tensor("pixels", "FP32", ["0"] * 3072, [1, 3, 32, 32])], ["a text"]),
        ([tensor("pixels", "FP32", [10**60] * 3072, [1, 3, 32, 32])], ["float32"]),
        ([tensor("pixels", "FP32", [255] * 3072, [1, 3, 32, 32])], ["pixels[0]", "0 to 1"]),
        ([tensor("texts", "BYTES", ["a", ""])], ["texts[1]", "empty"]),
        ([tensor("texts", "BYTES", ["a", "word " * 90])], ["texts[1]"]),
        ([{"name": "images", "datatype": "BYTES", "shape": [1]}], ["inputs[0]", "binary_data_size"]),
        ([tensor("images", "BYTES", ["x"], [-1])], ["/inputs/0/shape/0"]),
        ([tensor("images", "BYTES", ["x"], [10**30])], ["/inputs/0/shape/0"]),
        ([], ["/inputs"]),
    ],
)
def test_inputs_that_cannot_be(client: httpx.Client, inputs: list[dict[str, Any]], words: list[str]) -> None:
    refused(client.post(URL, json={"inputs": inputs}), 422, *words)


def test_a_shape_of_1e18_takes_no_memory(client: httpx.Client) -> None:
    for shape in ([10**18], [10**18, 1]):
        refused(client.post(URL, json={"inputs": [tensor("images", "BYTES", ["x"], shape)]}), 413, "at most 64")
        refused(binary(client, [("texts", "BYTES", shape, packed(b"x"))]), 413, "at most 1024")
    refused(binary(client, [("pixels", "FP32", [10**18, 3, 32, 32], b"1234")]), 413, "at most 64")
    refused(binary(client, [("pixels", "FP32", [1, 3, 10**18, 10**18], b"1234")]), 422, "[N, 3, 32, 32]")
    refused(binary(client, [("pixels", "UINT8", [2**64 - 1] * 8, b"")]), 422, "[N, 3, 32, 32]")
    labels = ("labels", "BYTES", [10**18], packed(b"x"))
    refused(binary(client, [("images", "BYTES", [1], packed(picture(1))), labels]), 413, "at most 1000")


def test_the_header_and_the_sizes_have_to_be_true(client: httpx.Client) -> None:
    good = ("texts", "BYTES", [1], packed(b"a cat"))
    assert binary(client, [good]).status_code == 200
    for length in (0, 10**6, 10**30, 5):
        refused(binary(client, [good], length), 400)
    head = {"inputs": [{"name": "texts", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 9}}]}
    body = json.dumps(head).encode()
    for header in ("x", "-1", "1.5", "٣"):
        headers = {"Inference-Header-Content-Length": header.encode()}
        refused(client.post(URL, content=body, headers=headers), 400, "Inference-Header-Content-Length")
    length = {"Inference-Header-Content-Length": str(len(body))}
    refused(client.post(URL, content=body + b"12345678", headers=length), 400, "9 bytes", "8 are left")
    refused(client.post(URL, content=body, headers={}), 400, "Inference-Header-Content-Length")
    refused(client.post(URL, content=body + packed(b"a cat") + b"!", headers=length), 400, "1 bytes")
    refused(binary(client, [("texts", "BYTES", [2], packed(b"a cat"))]), 422, "texts[1]", "end before")
    refused(binary(client, [("texts", "BYTES", [1], packed(b"a", b"b"))]), 422, "left behind")
    refused(binary(client, [("texts", "BYTES", [1], b"\xff\xff\xff\xffabc")]), 422, "texts[0]", "4294967295")
    refused(binary(client, [("texts", "BYTES", [2], packed(b"a", b"\xff"))]), 422, "texts[1]", "UTF-8")
    refused(binary(client, [("pixels", "FP32", [1, 3, 32, 32], b"\0" * 12287)]), 422, "12287", "12288")
    refused(binary(client, [("images", "BYTES", [2], packed(picture(1), b"x"))]), 422, "images[1]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_one_wrong_value_among_pixels_is_found(client: httpx.Client, value: float) -> None:
    values = np.full((3, 3, SIDE, SIDE), 0.5, np.float32)
    values[2, 1, 30, 31] = value
    refused(binary(client, [("pixels", "FP32", list(values.shape), values.tobytes())]), 422, "pixels[2]")


def test_outputs_and_parameters_that_cannot_be(client: httpx.Client) -> None:
    good = images(picture(1))
    refused(ask(client, good, labels=LABELS, outputs=["score"]), 422, "outputs[0].name", "scores, labels, cosine")
    refused(ask(client, good, outputs=["scores"]), 422, "embedding")
    refused(ask(client, good, labels=LABELS, outputs=["scores", "scores"]), 422, "twice")
    refused(ask(client, good, top_k=3), 422, "top_k", "label_set")
    refused(ask(client, tensor("texts", "BYTES", ["a"]), labels=LABELS), 422, "for pictures")
    refused(ask(client, good, tensor("labels", "BYTES", ["a"]), labels=LABELS), 422, "not both")
    refused(ask(client, good, labels=LABELS, label_set="emoji"), 422, "exactly one")
    refused(ask(client, good, labels="carrot, rocket"), 422, "/parameters/labels")
    refused(ask(client, good, labels="[carrot"), 422, "looks like JSON")
    refused(ask(client, good, labels=["a", "a"]), 422, "labels[1]")
    refused(ask(client, good, labels=LABELS, encoder="tiny"), 422, "/parameters/encoder")
    refused(ask(client, good, labels=LABELS, defence="armour"), 422, "cola")
    refused(ask(client, good, label_set="nope"), 404)
    refused(ask(client, good, defence="cola"), 422, "label_set")
    refused(client.post(URL, content=b"{"), 400)
    refused(client.post(URL, content=b"{}", headers={"content-type": "text/plain"}), 415, "application/json")
    refused(client.post("/v2/models/none/infer", json={}), 404, "tiny")
    refused(client.post("/v2/models/tiny/versions/0/infer", json={}), 404, "version")
    refused(client.post(URL, json={}, headers={"X-Request-Timeout-Ms": "soon"}), 422, "milliseconds")
    refused(ask(client, images(*[picture(1)] * 65), labels=LABELS), 413, "at most 64")
    late = {"inputs": [images(*(picture(i) for i in range(500, 564)))]}  # 64 new pictures do not take a millisecond
    refused(client.post(URL, json=late, headers={"X-Request-Timeout-Ms": "1"}), 504, "1 ms")
    for path in ("/v2/x", "/v2/models/tiny/config", "/v2/repository/index"):
        refused(client.get(path), 404)


def test_an_answer_too_large_for_json_goes_as_binary_data(tiny_artifact: Path, tmp_path: Path) -> None:
    """Its own app, so that its label set is in nobody's way; also the models while they load."""
    chosen = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path, device="cpu")
    with TestClient(create_app(chosen)) as client:
        response = client.get("/v2/models/tiny/ready")
        assert response.json() == {"name": "tiny", "ready": response.status_code == 200}
        while client.get("/v2/health/ready").status_code != 200:
            assert client.get("/v2/health/live").status_code == 200
        names = [f"thing {i}" for i in range(3200)]
        assert client.put("/label-sets/things", json={"labels": names, "templates": ["{}"]}).status_code == 201
        asked = {"inputs": [images(*[picture(i) for i in range(64)])], "outputs": [{"name": "scores"}]}
        refused(
            client.post(URL, json={**asked, "parameters": {"label_set": "things"}}), 422, "204800", "binary_data_output"
        )
        wide = {"label_set": "things", "binary_data_output": True}
        answer = client.post(URL, json={**asked, "parameters": wide}, headers={"X-Request-Timeout-Ms": "600000"})
        assert answer.status_code == 200
        length = int(answer.headers["inference-header-content-length"])
        scores = np.frombuffer(answer.content[length:], "<f4").reshape(64, 3200)
        np.testing.assert_allclose(scores.sum(1), 1, atol=1e-4)


names = st.sampled_from(["images", "pixels", "texts", "labels", "x", ""])
scalars = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=6)
inputs = st.fixed_dictionaries(
    {
        "name": names,
        "datatype": st.sampled_from(["BYTES", "UINT8", "FP32", "FP16", "bytes", ""]),
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([3, 32, 2**63, 10**18]), max_size=5) | scalars,
    },
    optional={
        "data": st.lists(scalars | st.lists(scalars, max_size=3), max_size=4) | scalars,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 64) | scalars}) | scalars,
    },
)


@given(
    st.lists(inputs, max_size=3),
    st.binary(max_size=64),
    st.none() | st.integers(-2, 2),
    st.none() | st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": scalars}), max_size=2),
    st.none() | st.dictionaries(st.sampled_from(["labels", "top_k", "defence", "tree", "truncate"]), scalars),
)
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_tensors_come_the_answer_is_json_with_an_error(
    client: httpx.Client, tensors: list[Any], data: bytes, off: int | None, outputs: Any, parameters: Any
) -> None:
    head = json.dumps({"inputs": tensors, "outputs": outputs, "parameters": parameters}).encode()
    headers = {} if off is None else {"Inference-Header-Content-Length": str(max(0, len(head) + off))}
    response = client.post(URL, content=head + data, headers=headers)
    assert response.status_code < 500, (head, data, response.text)
    assert response.status_code == 200 or list(response.json()) == ["error"]


def size_of(inputs: list[dict[str, Any]], data: bytes = b"", **parameters: Any) -> int:
    """What the options of a request take, as the service counts them."""
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    limits = Limits(ImageLimits(1 << 20, 1 << 20, 4096, urls=False), 64, 64, 1000)
    return read_inference(head + data, str(len(head)), "tiny", SIDE, limits).size


def test_options_are_as_large_however_they_and_the_pictures_come() -> None:
    def behind(name: str, kind: str, shape: list[int], data: bytes) -> dict[str, Any]:
        return {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data)}}

    names = [f"label {number} {'x' * 200}" for number in range(500)]
    data = packed(*(name.encode() for name in names))
    file, pixels = packed(picture(1)), [7] * 3 * SIDE * SIDE
    as_pixels = [tensor("pixels", "UINT8", pixels, [1, 3, SIDE, SIDE]), tensor("texts", "BYTES", ["long " * 999])]
    labels = behind("labels", "BYTES", [500], data)
    sizes = {
        size_of([images(picture(1))], labels=names),
        size_of([images(picture(1)), tensor("labels", "BYTES", names)]),
        size_of([images(picture(1)), labels], data),
        size_of([behind("images", "BYTES", [1], file), labels], file + data),
        size_of(as_pixels, labels=names),
        size_of([*as_pixels, labels], data),
    }
    assert len(sizes) == 1
    assert abs(sizes.pop() - len(data)) < 1000
    assert 0 < size_of([images(picture(1))], labels=LABELS) < 500
    assert size_of([images(picture(1))]) == 0


def test_what_is_seen_and_read_is_paid_for(locked: Locked) -> None:
    with locked.client("other-paying") as client:

        def cost(outputs: list[str], defence: dict[str, Any], labels: list[str], **others: Any) -> float:
            before = left(client.get("/models"))
            answer = ask(client, images(picture(71)), outputs=outputs, defence=defence, labels=labels, **others)
            assert answer.status_code == 200, answer.text
            return before - left(answer)

        def left(answer: httpx.Response) -> int:
            return int(answer.headers["ratelimit"].split("r=")[1].split(";")[0])

        cola, ttc = {"name": "cola", "views": 5}, {"name": "ttc"}
        costs = {one["name"]: one["cost"] for one in client.get("/models").json()["defence_details"]}
        for defence in (cola, ttc):
            cost(["scores"], defence, LABELS)  # the texts are known from here on
            for outputs in (["scores"], ["embedding"], ["warnings"], ["scores", "embedding", "warnings"]):
                assert abs(cost(outputs, defence, LABELS) - costs[defence["name"]]) <= 1, (defence, outputs)
        # Vectors that are made from the texts of labels pay for those, once; 80 texts are 20 points.
        many = [f"paid thing {number}" for number in range(80)]
        assert cost(["embedding"], cola, many, templates=["{}"]) >= costs["cola"] + 20
        assert abs(cost(["embedding"], cola, many, templates=["{}"]) - costs["cola"]) <= 1

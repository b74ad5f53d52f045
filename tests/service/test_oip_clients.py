"""The Open Inference Protocol as Triton's own client speaks it, with binary tensors both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.service.conftest import ServiceProcess, as_base64, picture

LABELS = ["carrot", "rocket", "cat face"]


@pytest.fixture(scope="module")
def api(tiny_service: ServiceProcess) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(f"127.0.0.1:{tiny_service.port}", network_timeout=30)
    yield client
    client.close()


def tensor(name: str, values: np.ndarray, kind: str, *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(values.shape), kind)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def texts(*values: str | bytes) -> np.ndarray:
    return np.array(values, dtype=object)


def test_the_client_finds_server_and_model(api: triton.InferenceServerClient) -> None:
    assert api.is_server_live()
    assert api.is_server_ready()
    assert api.get_server_metadata()["name"] == "ironclip"
    metadata = api.get_model_metadata("tiny")
    (version,) = metadata["versions"]
    assert api.is_model_ready("tiny", version)
    assert api.get_model_metadata("default", version) == metadata
    assert not api.is_model_ready("tiny", "0")
    assert not api.is_model_ready("other")


def test_files_and_labels_go_as_bytes_and_scores_come_as_floats(
    api: triton.InferenceServerClient, client: httpx.Client
) -> None:
    files = [picture(1), picture(2, "JPEG"), picture(3, "WEBP")]
    native = client.post("/classify", json={"images": list(map(as_base64, files)), "labels": LABELS}).json()
    rows = [{row["label"]: row["score"] for row in one["predictions"]} for one in native]
    wanted = np.array([[row[label] for label in LABELS] for row in rows], np.float32)
    images = tensor("images", texts(*files), "BYTES")
    answer = api.infer("tiny", [images, tensor("labels", texts(*LABELS), "BYTES")], request_id="42")
    assert np.array_equal(answer.as_numpy("scores"), wanted)
    assert [name.decode() for name in answer.as_numpy("labels")] == LABELS
    assert answer.get_response()["id"] == "42"
    as_parameter = api.infer("tiny", [images], parameters={"labels": json.dumps(LABELS)})
    assert np.array_equal(as_parameter.as_numpy("scores"), wanted)
    in_json = tensor("images", texts(*(as_base64(data) for data in files)), "BYTES", binary=False)
    outputs = [triton.InferRequestedOutput("scores", binary_data=False), triton.InferRequestedOutput("embedding")]
    mixed = api.infer("tiny", [in_json], outputs=outputs, parameters={"labels": json.dumps(LABELS)})
    assert np.array_equal(mixed.as_numpy("scores"), wanted)
    np.testing.assert_allclose(np.linalg.norm(mixed.as_numpy("embedding"), axis=1), 1, atol=1e-6)


def test_the_best_labels_are_those_of_the_best_scores(api: triton.InferenceServerClient) -> None:
    images = tensor("images", texts(picture(1), picture(2)), "BYTES")
    parameters = {"labels": json.dumps(LABELS), "top_k": 2}
    best = api.infer("tiny", [images], parameters=parameters)
    every = api.infer("tiny", [images], parameters={"labels": json.dumps(LABELS)}).as_numpy("scores")
    order = np.argsort(-every, axis=1)[:, :2]
    assert [[name.decode() for name in row] for row in best.as_numpy("top_labels")] == [
        [LABELS[k] for k in row] for row in order
    ]
    assert np.array_equal(best.as_numpy("top_scores"), np.take_along_axis(every, order, axis=1))


def test_pixels_go_in_both_datatypes(api: triton.InferenceServerClient) -> None:
    values = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    parameters = {"labels": json.dumps(LABELS)}
    whole = api.infer("tiny", [tensor("pixels", values, "UINT8")], parameters=parameters)
    floats = api.infer("tiny", [tensor("pixels", values.astype(np.float32) / 255, "FP32")], parameters=parameters)
    assert whole.get_response()["parameters"]["preprocessing"] == "none"
    assert np.array_equal(whole.as_numpy("scores"), floats.as_numpy("scores"))


def test_texts_are_embedded(api: triton.InferenceServerClient, client: httpx.Client) -> None:
    asked = ["a cat", "犬の写真"]
    native = client.post("/embed", json={"texts": asked}).json()["texts"]
    found = api.infer("tiny", [tensor("texts", texts(*(text.encode() for text in asked)), "BYTES")])
    np.testing.assert_allclose(found.as_numpy("text_embedding"), [one["embedding"] for one in native], atol=1e-8)


def test_the_client_understands_our_errors(api: triton.InferenceServerClient) -> None:
    images = tensor("images", texts(picture(1), b"no picture"), "BYTES")
    with pytest.raises(InferenceServerException, match=r"images\[1\]") as refused:
        api.infer("tiny", [images], parameters={"labels": json.dumps(LABELS)})
    assert refused.value.status() == "422"
    with pytest.raises(InferenceServerException, match="default") as missing:
        api.infer("other", [images])
    assert missing.value.status() == "404"
    with pytest.raises(InferenceServerException, match="classification"):
        api.infer("tiny", [images], outputs=[triton.InferRequestedOutput("scores", class_count=2)])

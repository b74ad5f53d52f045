"""Defences by request and by default: the library's answer, what they are charged for, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from ironclip.artifact import save_artifact
from ironclip.classifier import Classifier, predict
from ironclip.defences import DEFENCES, make_defence
from ironclip.defences.cola import Cola
from ironclip.encoder import Encoder
from ironclip.head import Head
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from ironclip.textbank import TextBank
from service.app import create_app
from service.routes import classify
from service.settings import Settings, SettingsInvalid
from tests.conftest import make_tiny_encoder
from tests.service.conftest import as_base64, metric, picture

LABELS: list[Any] = ["carrot", {"name": "rocket", "descriptions": ["it flies", "smoke"]}, "cat face"]


@pytest.fixture(scope="module")
def encoder(tiny_artifact: Path) -> Encoder:
    return load_encoder(str(tiny_artifact))


@pytest.fixture(scope="module")
def guarded(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service whose second encoder has COLA for its default; at most 8 views."""
    settings = Settings(
        encoders={"tiny": str(tiny_artifact), "tiny-cola": str(tiny_artifact)},
        defences={"tiny-cola": {"name": "cola", "views": 3}},
        dtype="float32",
        max_views=8,
        state_dir=tmp_path_factory.mktemp("state"),
    )
    with TestClient(create_app(settings)) as small:
        while small.get("/readyz").status_code != 200:
            pass
        yield small


def decided(encoder: Encoder, data: bytes, name: str, **options: Any) -> dict[str, float]:
    classifier = Classifier(encoder, LabelSet.parse(LABELS), defence=make_defence(name, options))
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    if classifier.defence.optimising:
        scores = classifier(to_float(pixels[None])).detach().softmax(-1)[0]
    else:
        scores = predict(classifier, pixels[None]).logits.softmax(-1)[0]
    return dict(zip(classifier.names, scores.tolist(), strict=True))


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in answer["predictions"]}


@pytest.mark.parametrize("name", DEFENCES)
def test_the_defended_answer_is_the_librarys(client: httpx.Client, encoder: Encoder, name: str) -> None:
    data = picture(31)
    answer = client.post("/classify", json={"image": as_base64(data), "labels": LABELS, "defence": name}).json()
    assert scores(answer) == pytest.approx(decided(encoder, data, name), abs=2e-4)
    assert answer["defence"] == {"name": name, **make_defence(name).options()}


def test_options_change_the_answer_and_its_cache_entry(client: httpx.Client, encoder: Encoder) -> None:
    data = picture(32)
    found = []
    for seed in (0, 1, 0):
        defence = {"name": "cola", "seed": seed, "weights": "uniform"}
        answer = client.post("/classify", json={"image": as_base64(data), "labels": LABELS, "defence": defence})
        assert scores(answer.json()) == pytest.approx(
            decided(encoder, data, "cola", seed=seed, weights="uniform"), abs=2e-4
        )
        found.append((answer.json()["predictions"], answer.headers["cache-status"]))
    assert found[0][0] != found[1][0]
    assert found[0][0] == found[2][0]
    assert [status.startswith("ironclip; hit") for _, status in found] == [False, False, True]


def test_all_input_forms_take_a_defence(client: httpx.Client) -> None:
    data, names = picture(33), ["carrot", "rocket"]
    form = client.post(
        "/classify", files={"image": data}, data={"labels": names, "defence": '{"name":"cola","views":2}'}
    )
    raw = client.post(
        "/classify",
        params={"labels": names, "defence": '{"name":"cola","views":2}'},
        content=data,
        headers={"Content-Type": "image/png"},
    )
    assert form.json() == raw.json()
    assert form.json()["defence"]["views"] == 2


def test_views_count_as_items(client: httpx.Client) -> None:
    series = 'ironclip_batch_size_sum{tower="image"}'
    before = metric(str(client.base_url), series)
    data = [as_base64(picture(seed)) for seed in range(340, 344)]
    client.post("/classify", json={"images": data, "labels": LABELS, "defence": {"name": "cola", "views": 7}})
    assert metric(str(client.base_url), series) - before == 4 * 7


def test_an_encoders_own_defence_stands_unless_another_is_asked_for(guarded: TestClient, encoder: Encoder) -> None:
    data = picture(35)
    ask = {"image": as_base64(data), "labels": LABELS, "encoder": "tiny-cola"}
    own, none = (
        guarded.post("/classify", json=ask).json(),
        guarded.post("/classify", json={**ask, "defence": "none"}).json(),
    )
    assert own["defence"] == {"name": "cola", **make_defence("cola", {"views": 3}).options()}
    assert scores(own) == pytest.approx(decided(encoder, data, "cola", views=3), abs=2e-4)
    assert scores(none) == pytest.approx(decided(encoder, data, "none"), abs=2e-4)
    listed = guarded.get("/models").json()
    assert [one["defence"]["name"] for one in listed["models"]] == ["none", "cola"]
    details = {one["name"]: one for one in listed["defence_details"]}
    assert list(details) == list(DEFENCES)
    assert details["cola"]["random"]
    assert details["cola"]["options"]["views"] == 5


@pytest.mark.parametrize(
    ("defence", "pointer", "says"),
    [
        ({"name": "cola", "views": 9}, "/defence", "IRONCLIP_MAX_VIEWS"),
        ({"name": "ttc", "steps": 3}, "/defence", "11 forwards"),
        ({"name": "cola", "views": 0}, "/defence/views", "whole number"),
        ({"name": "cola", "vieuws": 5}, "/defence", "smallest_crop"),
        ({"name": "cola", "epsilon": 1e-9}, "/defence/epsilon", "0.05"),
    ],
)
def test_options_outside_the_servers_limits_are_refused(
    guarded: TestClient, defence: dict[str, Any], pointer: str, says: str
) -> None:
    answer = guarded.post("/classify", json={"image": as_base64(picture(1)), "labels": LABELS, "defence": defence})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert says in answer.json()["detail"]


def test_deciding_that_would_take_minutes_is_refused(guarded: TestClient) -> None:
    labels = [{"name": f"label {i}", "descriptions": [f"it is {j}" for j in range(30)]} for i in range(900)]
    ask = {"images": [as_base64(picture(seed)) for seed in range(60)], "labels": labels}
    defence = {"name": "cola", "coupling": "exact", "views": 8}
    answer = guarded.post("/classify", json={**ask, "defence": defence})
    assert answer.status_code == 413
    assert "product coupling" in answer.json()["detail"]


def test_an_embedding_takes_a_defence_that_reads_labels_with_a_label_set_alone(
    guarded: TestClient, encoder: Encoder
) -> None:
    data = picture(36)
    assert guarded.put("/label-sets/things", json={"labels": LABELS}).status_code == 201
    ask = {"images": [as_base64(data)], "defence": "cola"}
    refused = guarded.post("/embed", json=ask)
    assert refused.status_code == 422
    assert "registered label_set" in refused.json()["detail"]
    assert refused.json()["errors"][0]["pointer"] == "/label_set"
    answer = guarded.post("/embed", json={**ask, "label_set": "things", "texts": ["a carrot"]}).json()
    classifier = Classifier(encoder, LabelSet.parse(LABELS), defence=make_defence("cola"))
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    expected = classifier.vectors(classifier.encode(to_float(pixels[None]))).detach().numpy()[0]
    np.testing.assert_allclose(answer["images"][0]["embedding"], expected, atol=1e-4)
    assert answer["defence"]["name"] == "cola"
    needless = guarded.post("/embed", json={"images": [as_base64(data)], "label_set": "things"})
    assert needless.status_code == 422
    assert needless.json()["errors"][0]["pointer"] == "/label_set"


@pytest.mark.parametrize("bound", ["_MAX_SCORES", "_MAX_COSTS"])
def test_an_embedding_holds_no_more_of_a_label_set_than_a_decision(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    assert guarded.put("/label-sets/many", json={"labels": [f"label {i}" for i in range(20)]}).is_success
    pictures = {"images": [as_base64(picture(seed)) for seed in (37, 38)], "label_set": "many"}
    asked = {**pictures, "defence": {"name": "cola", "views": 4}}
    monkeypatch.setattr(classify, "_MAX_SCORES", 2 * 4 * 20)
    assert guarded.post("/embed", json=asked).status_code == 200
    monkeypatch.setattr(classify, bound, 2 * 20)  # what as many pictures of one view each would have
    for path in ("/embed", "/classify"):
        answer = guarded.post(path, json=asked)
        assert (answer.status_code, answer.json()["code"]) == (413, "input-too-large"), path
        assert answer.json()["errors"][0]["pointer"] == "/defence"


def test_an_encoders_own_defence_stands_before_embeddings_where_it_can(guarded: TestClient, encoder: Encoder) -> None:
    data = picture(37)
    plain = guarded.post("/embed", json={"images": [as_base64(data)], "encoder": "tiny-cola"}).json()
    assert plain["defence"] == {"name": "none"}
    moved = guarded.post("/embed", json={"images": [as_base64(data)], "defence": "ttc"}).json()
    assert moved["defence"]["name"] == "ttc"
    assert not np.allclose(plain["images"][0]["embedding"], moved["images"][0]["embedding"], atol=1e-3)


@pytest.mark.parametrize(
    ("defences", "says"),
    [
        ({"tiny": "armour"}, "there are: none, cola"),
        ({"tiny": {"name": "cola", "views": 99}}, "IRONCLIP_MAX_VIEWS"),
        ({"tiny": 7}, "IRONCLIP_DEFENCES"),
    ],
)
def test_a_default_that_cannot_be_is_said_at_start(tiny_artifact: Path, defences: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsInvalid, match=says):
        create_app(Settings(encoders={"tiny": str(tiny_artifact)}, defences=defences))


def test_a_default_for_an_encoder_that_is_not_served_is_said_at_start(tiny_artifact: Path) -> None:
    with pytest.raises(ValueError, match="not among the encoders"):
        Settings(encoders={"tiny": str(tiny_artifact)}, defences={"tny": "cola"})


def test_the_variable_has_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_DEFENCES", "demo=cola,demo-vit=ttc")
    assert Settings().defences == {"demo": "cola", "demo-vit": "ttc"}
    monkeypatch.setenv("IRONCLIP_DEFENCES", '{"demo": {"name": "cola", "views": 3}}')
    assert Settings().defences == {"demo": {"name": "cola", "views": 3}}


def test_a_defence_that_does_not_serve_the_head_is_refused(tmp_path: Path) -> None:
    encoder = make_tiny_encoder()
    encoder.head = Head("poincare", 1.0, 0.5, 0.5, 10.0)
    save_artifact(encoder, tmp_path / "ball", {"method": "test"})
    settings = Settings(encoders={"ball": str(tmp_path / "ball")}, dtype="float32", state_dir=tmp_path / "state")
    with TestClient(create_app(settings)) as small:
        while small.get("/readyz").status_code != 200:
            pass
        answer = small.post("/classify", json={"image": as_base64(picture(1)), "labels": LABELS, "defence": "cola"})
        assert answer.status_code == 422
        assert "poincare" in answer.json()["detail"]
        vectors = small.post("/embed", json={"images": [as_base64(picture(1))], "defence": "ttc"})
        assert vectors.status_code == 200


def test_uneven_label_sets_are_charged_for_what_they_hold(guarded: TestClient, encoder: Encoder) -> None:
    """One label with many texts makes as wide a table as if all had so many."""
    from service.decisions import _size

    uneven = [{"name": "busy", "prompts": [f"prompt {i}" for i in range(150)]}, *(f"label {i}" for i in range(300))]
    classifier = Classifier(encoder, LabelSet.parse(uneven), defence=make_defence("cola", {"texts": 1000}))
    bank = sum(getattr(classifier.bank, name).nbytes for name in ("texts", "weights"))
    assert _size(classifier) > classifier.label_bytes > bank
    assert classifier.label_bytes < 20 * classifier.bank.texts.nbytes  # not laid out, since most of it would be empty
    wide = [{"name": "busy", "prompts": [f"prompt {i}" for i in range(190)]}, *(f"label {i}" for i in range(990))]
    ask = {"images": [as_base64(picture(seed)) for seed in range(20)], "labels": wide}
    defence = {"name": "cola", "texts": 1000, "views": 8, "iterations": 1000}
    assert guarded.post("/classify", json={**ask, "defence": defence}).status_code == 413


@pytest.mark.parametrize("memory", [4096, 256 << 20])
def test_labels_are_prepared_once_whatever_the_draws(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Also where one Classifier is more than there is memory for: the newest is kept."""
    prepared: list[Cola] = []
    prepare = Cola.prepare

    def counted(self: Cola, bank: TextBank) -> Any:
        prepared.append(self)
        return prepare(self, bank)

    monkeypatch.setattr(Cola, "prepare", counted)
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)}, dtype="bfloat16", text_cache_bytes=memory, state_dir=tmp_path / "state"
    )
    with TestClient(create_app(settings)) as small:
        while small.get("/readyz").status_code != 200:
            pass
        for seed in range(3):
            ask = {"image": as_base64(picture(seed)), "labels": LABELS}
            for options in ({"seed": seed}, {"seed": seed, "views": 2 + seed}, {"coupling": "product"}):
                answer = small.post("/classify", json={**ask, "defence": {"name": "cola", **options}})
                assert answer.status_code == 200, answer.text
                assert answer.json()["defence"]["seed"] == options.get("seed", 0)
            probe = {**ask, "defence": {"name": "cola", "views": 2, "seed": seed}, "eps": [1], "gradients": 1}
            assert small.post("/attack-probe", json=probe).status_code == 200
        assert len(prepared) == 1
        answer = small.post("/classify", json={**ask, "defence": {"name": "cola", "rank": 3}})
        assert answer.status_code == 200
        assert len(prepared) == 2

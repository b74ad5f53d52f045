"""/classify over HTTP: every form of input, and the answer that the library gives for the same picture."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from ironclip.artifact import save_artifact
from ironclip.classifier import Classifier, predict
from ironclip.domain import fit_domain
from ironclip.encoder import Encoder
from ironclip.head import Head
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from service.app import create_app
from service.settings import Settings
from tests.conftest import make_tiny_encoder
from tests.service.conftest import ServiceProcess, as_base64, picture

LABELS = ["carrot", "rocket", "cat face"]
TREE = {"levels": ["name", "kind"], "parents": {"carrot": "thing", "rocket": "thing", "cat face": "animal"}}


@pytest.fixture(scope="module")
def encoder(tiny_artifact: Path) -> Encoder:
    return load_encoder(str(tiny_artifact))


def decide(encoder: Encoder, data: bytes, labels: object = LABELS, **options: object) -> dict[str, float]:
    classifier = Classifier(encoder, LabelSet.parse(labels), **options)  # type: ignore[arg-type]
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    scores = predict(classifier, pixels[None]).logits.softmax(-1)[0].tolist()
    return dict(zip(classifier.names, scores, strict=True))


def scores(answer: dict[str, object]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in answer["predictions"]}  # type: ignore[attr-defined]


def test_the_answer_is_the_librarys(client: httpx.Client, encoder: Encoder) -> None:
    data = picture(1)
    answer = client.post("/classify", json={"image": as_base64(data), "labels": LABELS}).json()
    assert scores(answer) == pytest.approx(decide(encoder, data), abs=1e-5)
    ranked = [row["score"] for row in answer["predictions"]]
    assert ranked == sorted(ranked, reverse=True)
    assert sum(ranked) == pytest.approx(1, abs=1e-5)
    assert answer["encoder"] == {"name": "tiny", "digest": encoder.digest, "dtype": "float32", "head": "cosine"}
    assert answer["label_set"] == {"digest": LabelSet.parse(LABELS).digest}
    assert answer["preprocessing"]["digest"] == encoder.preprocessing.digest
    assert answer["defence"] == {"name": "none"}
    for row in answer["predictions"]:
        assert -1 <= row["cosine"] <= 1


def test_every_form_of_input_gives_the_same_answer(client: httpx.Client) -> None:
    for form, kind in (("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")):
        data = picture(2, form)
        asked = {"labels": LABELS, "top_k": 2, "templates": ["a {}", "one {}"], "levels": "rollup"}
        answers = [
            client.post("/classify", json={"image": as_base64(data), "tree": TREE, **asked}),
            client.post("/classify", json={"image": f"data:{kind};base64,{as_base64(data)}", "tree": TREE, **asked}),
            client.post(
                "/classify",
                files={"image": ("x", data, kind)},
                data={"tree": json.dumps(TREE), "defence": "none", **asked},
            ),
            client.post(
                "/classify",
                params={**asked, "tree": json.dumps(TREE), "defence": '{"name": "none"}'},
                content=data,
                headers={"content-type": kind},
            ),
        ]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert answer.json() == answers[0].json()


def test_several_images_each_have_their_own_outcome(client: httpx.Client, encoder: Encoder) -> None:
    good = [picture(i) for i in (3, 4)]
    images = [as_base64(good[0]), "not base64!", as_base64(good[1]), as_base64(good[0][:40])]
    response = client.post("/classify", json={"images": images, "labels": LABELS})
    assert response.status_code == 200
    answer = response.json()
    assert [("error" in item) for item in answer] == [False, True, False, True]
    for item, data in ((answer[0], good[0]), (answer[2], good[1])):
        assert scores(item) == pytest.approx(decide(encoder, data), abs=1e-5)
    assert answer[1]["error"]["errors"][0]["pointer"] == "/images/1"
    assert answer[3]["error"]["code"] == "image-invalid"
    files = [("images", ("a.png", data, "image/png")) for data in good]
    form = client.post("/classify", files=files, data={"labels": LABELS}).json()
    assert form == [answer[0], answer[2]]


def test_sixty_four_images_and_not_one_more(client: httpx.Client) -> None:
    image = as_base64(picture(5))
    assert len(client.post("/classify", json={"images": [image] * 64, "labels": ["a"]}).json()) == 64
    refused = client.post("/classify", json={"images": [image] * 65, "labels": ["a"]})
    assert refused.status_code == 413
    assert refused.json()["limit"] == 64
    files = [("images", ("x.png", b"x", "image/png"))] * 65
    assert client.post("/classify", files=files, data={"labels": ["a"]}).status_code == 413


def test_labels_may_bring_prompts_and_descriptions(client: httpx.Client, encoder: Encoder) -> None:
    labels = [{"name": "carrot", "prompts": ["a vegetable"]}, {"name": "rocket", "descriptions": ["it flies"]}, "cat"]
    data = picture(6)
    answer = client.post("/classify", json={"image": as_base64(data), "labels": labels}).json()
    assert scores(answer) == pytest.approx(decide(encoder, data, labels), abs=1e-5)


def test_levels_by_rollup_add_up_and_by_prompts_compete(client: httpx.Client, encoder: Encoder) -> None:
    data = picture(7)
    asked = {"image": as_base64(data), "labels": LABELS, "tree": TREE}
    rolled = client.post("/classify", json={**asked, "levels": "rollup"}).json()
    kinds = {row["label"]: row["score"] for row in rolled["levels"]["kind"]}
    leaves = scores(rolled)
    assert kinds["thing"] == pytest.approx(leaves["carrot"] + leaves["rocket"], abs=1e-5)
    prompted = client.post("/classify", json={**asked, "levels": "prompts"}).json()
    classifier = Classifier(encoder, LabelSet.parse(LABELS), tree=LabelTree.parse(TREE), levels="prompts")
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    wanted = predict(classifier, pixels[None]).levels["kind"].softmax(-1)[0]
    answered = {row["label"]: row["score"] for row in prompted["levels"]["kind"]}
    assert answered["thing"] == pytest.approx(wanted[0].item(), abs=1e-5)
    assert scores(prompted) == leaves


def test_several_trees_over_the_same_labels(client: httpx.Client) -> None:
    trees = {"kinds": TREE, "colours": {"parents": {"carrot": "orange", "rocket": "white", "cat face": "orange"}}}
    answer = client.post("/classify", json={"image": as_base64(picture(8)), "labels": LABELS, "tree": trees}).json()
    assert set(answer["levels"]) == {"kinds/kind", "colours/1"}


def test_a_tree_as_text_goes_with_every_form(client: httpx.Client) -> None:
    tree = "carrot\tthing\nrocket\tthing\ncat face\tanimal"
    answer = client.post(
        "/classify", files={"image": picture(8)}, data={"labels": LABELS, "tree": tree, "levels": "rollup"}
    ).json()
    assert {row["label"] for row in answer["levels"]["1"]} == {"thing", "animal"}


def test_top_k_is_taken_after_the_cache(client: httpx.Client) -> None:
    asked = {"image": as_base64(picture(90_009)), "labels": LABELS}
    one = client.post("/classify", json={**asked, "top_k": 1})
    three = client.post("/classify", json={**asked, "top_k": 3})
    assert one.headers["cache-status"] == "ironclip; fwd=miss"
    assert three.headers["cache-status"] == "ironclip; hit"
    assert one.json()["predictions"] == three.json()["predictions"][:1]


def test_the_same_pixels_in_other_bytes_hit_the_cache(client: httpx.Client) -> None:
    image = Image.open(io.BytesIO(picture(10)))
    files = []
    for level in (1, 9):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=level)
        files.append(buffer.getvalue())
    assert files[0] != files[1]
    first, second = (client.post("/classify", json={"image": as_base64(data), "labels": LABELS}) for data in files)
    assert first.headers["cache-status"] == "ironclip; fwd=miss"
    assert second.headers["cache-status"] == "ironclip; hit"
    assert first.json() == second.json()


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["carrot", "rocket", "dog"]},
        {"labels": ["rocket", "carrot", "cat face"]},
        {"templates": ["another {}"]},
    ],
)
def test_another_question_is_not_answered_from_the_cache(
    client: httpx.Client, encoder: Encoder, change: dict[str, object]
) -> None:
    data = picture(11)
    asked = {"image": as_base64(data), "labels": LABELS}
    client.post("/classify", json=asked)
    after = client.post("/classify", json={**asked, **change}).json()
    labels = change.get("labels", LABELS)
    label_set = LabelSet.parse(labels, change.get("templates"))
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(data)))
    wanted = predict(Classifier(encoder, label_set), pixels[None]).logits.softmax(-1)[0].tolist()
    assert scores(after) == pytest.approx(dict(zip(label_set.names, wanted, strict=True)), abs=1e-5)


def test_batch_mates_do_not_matter(client: httpx.Client, encoder: Encoder) -> None:
    pictures = [picture(100 + i) for i in range(16)]
    together = client.post(
        "/classify", json={"images": [as_base64(data) for data in pictures], "labels": LABELS}
    ).json()
    for answer, data in zip(together, pictures, strict=True):
        assert scores(answer) == pytest.approx(decide(encoder, data), abs=1e-5)


def test_what_was_done_to_the_picture_is_said(client: httpx.Client) -> None:
    image = Image.open(io.BytesIO(picture(12))).convert("RGBA")
    image.putalpha(128)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    for _ in range(2):  # from the decoder, then from the cache
        answer = client.post("/classify", json={"image": as_base64(buffer.getvalue()), "labels": LABELS}).json()
        assert answer["preprocessing"]["warnings"] == ["alpha-composited"]


def test_registered_labels_give_the_answer_of_sent_ones(client: httpx.Client) -> None:
    document = {"labels": LABELS, "templates": ["a {}"], "tree": TREE}
    stored = client.put("/label-sets/classify-test", json=document).json()
    image = as_base64(picture(13))
    sent = client.post("/classify", json={"image": image, **document, "levels": "rollup"}).json()
    for name in ("classify-test", f"classify-test@{stored['digest']}"):
        answer = client.post("/classify", json={"image": image, "label_set": name, "levels": "rollup"}).json()
        assert answer["predictions"] == sent["predictions"]
        assert answer["levels"] == sent["levels"]
        assert answer["label_set"] == {"name": "classify-test", "digest": stored["digest"]}


def test_shipped_label_sets_are_there_from_the_start(client: httpx.Client) -> None:
    names = {row["name"] for row in client.get("/label-sets").json()["label_sets"] if row["read_only"]}
    assert {"emoji", "emoji-groups", "emoji-subgroups"} <= names
    answer = client.post("/classify", json={"image": as_base64(picture(14)), "label_set": "emoji", "levels": "rollup"})
    assert len(answer.json()["predictions"]) == 100
    assert set(answer.json()["levels"]) == {"subgroup", "group"}


def test_the_alias_default_and_the_name_are_one(client: httpx.Client) -> None:
    asked = {"image": as_base64(picture(15)), "labels": LABELS}
    named = client.post("/classify", json={**asked, "encoder": "tiny"}).json()
    assert client.post("/classify", json={**asked, "encoder": "default"}).json() == named


def test_the_timing_of_the_stages_is_told(client: httpx.Client) -> None:
    header = client.post("/classify", json={"image": as_base64(picture(16)), "labels": LABELS}).headers["server-timing"]
    assert {part.split(";")[0] for part in header.split(", ")} >= {"receive", "cache", "decode", "model", "serialise"}


def test_concurrent_requests_with_new_labels_get_right_answers(client: httpx.Client, encoder: Encoder) -> None:
    """Text banks are made once for each set while many ask; nobody gets another's."""
    from concurrent.futures import ThreadPoolExecutor

    sets = [[f"thing {i}", f"other {i}"] for i in range(4)] * 4
    data = picture(17)

    def ask(labels: list[str]) -> dict[str, float]:
        return scores(client.post("/classify", json={"image": as_base64(data), "labels": labels}).json())

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, sets))
    for labels, answer in zip(sets, answers, strict=True):
        assert answer == pytest.approx(decide(encoder, data, labels), abs=1e-5)


def test_a_picture_unlike_the_training_art_is_marked(tmp_path: Path) -> None:
    encoder = make_tiny_encoder()
    noise = np.random.default_rng(0)
    dark = [noise.integers(0, 60, (32, 32, 3), dtype=np.uint8) for _ in range(40)]
    bright = np.full((32, 32, 3), 255, np.uint8)

    def png(values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        return buffer.getvalue()

    def features(values: list[np.ndarray]) -> torch.Tensor:
        pixels = torch.stack([encoder.preprocessing(Image.fromarray(one))[0] for one in values])
        with torch.no_grad():
            return encoder.encode_image(to_float(pixels))

    domain = fit_domain(features(dark), torch.zeros(40, dtype=torch.int64), "dark noise")
    inside, outside = domain.score(features([dark[0], bright])).tolist()
    assert outside < inside
    domain = dataclasses.replace(domain, threshold=(inside + outside) / 2)
    folder = save_artifact(encoder, tmp_path / "artifact", {"name": "dark", "domain": domain.to_json()})
    domain.save(folder)
    settings = Settings(encoders={"dark": str(folder)}, dtype="float32", state_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        for _ in range(2):  # from the model, then from the cache
            images = [as_base64(png(dark[0])), as_base64(png(bright))]
            answers = client.post("/classify", json={"images": images, "labels": LABELS}).json()
            assert [answer["domain"]["inside"] for answer in answers] == [True, False]
            assert "warning" not in answers[0]["domain"]
            assert "dark noise" in answers[1]["domain"]["warning"]
            assert answers[1]["domain"]["score"] == pytest.approx(outside, rel=0.05)


def test_a_hyperbolic_head_is_served_as_the_library_decides(
    tmp_path: Path, start_service: Callable[..., ServiceProcess]
) -> None:
    made = make_tiny_encoder()
    made.head = Head("poincare", curvature=0.8, image_scale=0.2, text_scale=0.3, temperature=15.0)
    folder = save_artifact(made, tmp_path / "hyperbolic", {"name": "hyperbolic"})
    url = start_service(encoders=f"hyperbolic={folder}").url
    data = picture(3)
    encoder = load_encoder(str(folder))
    body = {"image": as_base64(data), "labels": LABELS, "tree": TREE, "levels": "prompts"}
    for _ in range(2):  # the second answer comes from the caches
        answer = httpx.post(f"{url}/classify", json=body, timeout=30).json()
        assert answer["encoder"]["head"] == "poincare"
        assert scores(answer) == pytest.approx(decide(encoder, data), abs=1e-5)
    plain = load_encoder(str(folder))
    plain.head = Head()
    assert scores(answer) != pytest.approx(decide(plain, data), abs=1e-3)

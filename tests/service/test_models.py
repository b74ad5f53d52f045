"""Encoders that come and go in a running service: swapped under load, tried on a share, refused, watched in a folder.

One service for the whole module; the last test kills it and starts it again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ironclip.artifact import META_FILE, WEIGHTS_FILE, save_artifact
from ironclip.classifier import Classifier
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import load_image, to_float
from service.versions import NEXT, Version
from tests.conftest import make_tiny_encoder
from tests.service import conftest
from tests.service.conftest import (
    ServiceProcess,
    as_base64,
    free_port,
    launch_service,
    make_key,
    metric,
    picture,
    write_keys,
)

until = partial(conftest.until, seconds=60)  # encoders are loaded meanwhile

LABELS = ["cat", "dog", "ship"]
PICTURES = 6


@dataclass
class World:
    """A service, an administrator's client and a caller's, and artifacts of which it may load those in `folder`."""

    service: ServiceProcess
    metrics_url: str
    settings: dict[str, object]
    root: Path
    folder: Path
    store: Path
    keys: dict[str, str]
    digests: list[str]
    scores: list[list[list[float]]]  # by version and picture

    def client(self, key: str = "admin") -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.service.url, headers=headers, timeout=30)

    def put(self, name: str, spec: object, **more: object) -> httpx.Response:
        with self.client() as client:
            return client.put(f"/models/{name}", json={"spec": str(spec), **more})

    def versions(self, name: str) -> dict[str, dict[str, Any]]:
        """The versions of an encoder by their role; {} for one that is not there."""
        with self.client() as client:
            return {row["role"]: row for row in client.get(f"/models/{name}").json().get("versions", [])}

    def settled(self, name: str) -> dict[str, dict[str, Any]]:
        """The same, when nothing comes or leaves any more."""
        until(lambda: not {"coming", "leaving"} & set(self.versions(name)))
        return self.versions(name)

    def load(self, name: str, number: int, **more: object) -> dict[str, dict[str, Any]]:
        response = self.put(name, self.store / f"v{number}", **more)
        assert response.status_code in (200, 202), response.text
        return self.settled(name)

    def ask(self, client: httpx.Client, seed: int, encoder: str = "default", **headers: str) -> httpx.Response:
        form = {"image": as_base64(picture(seed)), "labels": LABELS, "encoder": encoder}
        return client.post("/classify", json=form, headers=headers)

    def agrees(self, answer: dict[str, Any], seed: int) -> bool:
        """Whether the scores are those of the version that the answer names."""
        expected = self.scores[self.digests.index(answer["encoder"]["digest"])][seed]
        found = {row["label"]: row["score"] for row in answer["predictions"]}
        return all(math.isclose(found[label], expected[k], abs_tol=1e-4) for k, label in enumerate(LABELS))


def scores_of(folder: Path, root: Path) -> list[list[float]]:
    """What the library says of the pictures, without the service."""
    encoder = load_encoder(str(folder)).served()
    classifier = Classifier(encoder, LabelSet.parse(LABELS))
    rows = []
    for seed in range(PICTURES):
        (root / "picture.png").write_bytes(picture(seed))
        pixels = to_float(encoder.preprocessing(load_image(root / "picture.png"))[0])
        with torch.no_grad():
            rows.append(classifier(pixels[None])[0].softmax(-1).tolist())
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("models")
    folder, store, outside = root / "folder", root / "store", root / "outside"
    folder.mkdir()
    for number in range(3):
        save_artifact(make_tiny_encoder(number), store / f"v{number}", {"name": f"v{number}"})
    save_artifact(make_tiny_encoder(7), outside / "secret", {})
    scopes = {"admin": ("admin", "infer"), "caller": ("infer",)}
    keys = write_keys(root / "keys.toml", {name: make_key(f"{name}1", "", *of) for name, of in scopes.items()})
    metrics_port = free_port()
    settings: dict[str, object] = {
        "encoders": f"tiny={store / 'v0'}",
        "keys_file": root / "keys.toml",
        "metrics_port": metrics_port,
        "models_dir": folder,
        "models_poll_seconds": 0.2,
        "model_specs": f"{store}/*,random:*",
        "max_queue_ms": 20_000,
    }
    service = launch_service(root, **settings)
    try:
        digests = [load_encoder(str(store / f"v{number}")).digest for number in range(3)]
        scores = [scores_of(store / f"v{number}", root) for number in range(3)]
        service.wait_ready()
        url = f"http://127.0.0.1:{metrics_port}"
        yield World(service, url, settings, root, folder, store, keys, digests, scores)
    finally:
        service.stop()


@contextlib.contextmanager
def load(world: World) -> Iterator[list[tuple[int, httpx.Response]]]:
    """Three clients that ask without a pause; gives their answers with the picture of each."""
    answers: list[tuple[int, httpx.Response]] = []
    stopping = threading.Event()

    def run(first: int) -> None:
        with world.client("caller") as client:
            seed = first
            while not stopping.is_set():
                seed = (seed + 1) % PICTURES
                answers.append((seed, world.ask(client, seed)))

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(run, first) for first in range(3)]
        try:
            yield answers
        finally:
            stopping.set()
            for future in futures:
                future.result()


def test_a_swap_under_load_costs_nobody_an_answer(world: World) -> None:
    with load(world) as answers:
        until(lambda: len(answers) > 5)
        assert world.load("tiny", 1)["stable"]["digest"] == world.digests[1]
        swapped = len(answers)
        until(lambda: len(answers) > swapped + 10)
    assert {answer.status_code for _, answer in answers} == {200}
    seen = Counter(answer.json()["encoder"]["digest"] for _, answer in answers)
    assert set(seen) == set(world.digests[:2])
    assert not [answer.text for seed, answer in answers if not world.agrees(answer.json(), seed)]
    assert all(
        answer.headers["X-Ironclip-Encoder"] == f"tiny@{answer.json()['encoder']['digest']}" for _, answer in answers
    )
    text = httpx.get(f"{world.metrics_url}/metrics").text
    assert world.digests[0][:12] not in text
    assert f'ironclip_model_info{{digest="{world.digests[1]}"' in text


def test_the_digest_is_in_every_form_of_answer(world: World) -> None:
    with world.client("caller") as client:
        stable = client.get("/models/tiny").json()["digest"]
        answers = [
            client.post("/embed", json={"texts": ["a"], "encoder": "tiny"}),
            client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}),
            client.post(
                "/v2/models/tiny/infer",
                json={"inputs": [{"name": "texts", "datatype": "BYTES", "shape": [1], "data": ["a"]}]},
            ),
        ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Ironclip-Encoder"] == f"tiny@{stable}"
    assert answers[0].json()["encoder"]["digest"] == stable
    assert answers[2].json()["parameters"]["encoder_digest"] == stable


def test_a_canary_gets_its_share_and_is_promoted(world: World) -> None:
    stable = world.versions("tiny")["stable"]["digest"]
    canary = world.digests[2]
    standing = world.load("tiny", 2, canary=0.3)
    assert (standing["canary"]["share"], standing["stable"]["share"]) == (0.3, 0.7)
    with world.client("caller") as client:
        ids = [f"request-{i:04}" for i in range(400)]

        def digest(identity: str, encoder: str = "tiny") -> str:
            answer = world.ask(client, 0, encoder, **{"X-Request-Id": identity})
            assert world.agrees(answer.json(), 0)
            return str(answer.json()["encoder"]["digest"])

        seen = {identity: digest(identity) for identity in ids}
        count = Counter(seen.values())
        # Binomial with p = 0.3: six standard deviations are 55; the ids are fixed, so that it is one draw for ever.
        assert set(count) == {stable, canary}
        assert abs(count[canary] - 120) < 55
        assert [digest(identity) for identity in ids[:20]] == [seen[identity] for identity in ids[:20]]
        # More of it keeps those that it has.
        assert world.put("tiny", world.store / "v2", digest=canary, canary=0.6).status_code == 200
        assert {digest(identity) for identity in ids if seen[identity] == canary} == {canary}
        # Pinned, and as the versions of the Open Inference Protocol.
        assert {digest(identity, f"tiny@{stable[:12]}") for identity in ids[:20]} == {stable}
        assert {digest(identity, f"tiny@{canary[:8]}") for identity in ids[:20]} == {canary}
        assert world.ask(client, 0, f"tiny@{'0' * 12}").status_code == 404
        assert world.ask(client, 0, f"tiny@{canary[:4]}").status_code == 404
        model = client.get("/v2/models/tiny").json()
        assert model["versions"] == [stable[:12], canary[:12]]
        form = {
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [as_base64(picture(0))]}],
            "parameters": {"labels": json.dumps(LABELS)},
        }
        for version in (stable[:12], canary[:12]):
            answer = client.post(f"/v2/models/tiny/versions/{version}/infer", json=form)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model_version"] == version
            got = next(one["data"] for one in answer.json()["outputs"] if one["name"] == "scores")
            row = world.scores[[one[:12] for one in world.digests].index(version)][0]
            assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(got, row, strict=True))
    series = f'ironclip_requests_by_version_total{{code="2xx",digest="{canary[:12]}",encoder="tiny"}}'
    assert metric(world.metrics_url, series) > 100
    with world.client() as admin:
        assert admin.post("/models/tiny/promote").status_code == 200
        until(lambda: set(world.versions("tiny")) == {"stable"})
        assert world.versions("tiny")["stable"]["digest"] == canary
        assert admin.post("/models/tiny/promote").status_code == 404
        assert "ironclip_canary_share{" not in httpx.get(f"{world.metrics_url}/metrics").text
        # Another one, which is not kept.
        assert set(world.load("tiny", 0, canary=0.5)) == {"stable", "canary"}
        assert admin.delete("/models/tiny/canary").status_code == 200
        assert world.settled("tiny")["stable"]["digest"] == canary
        assert world.put("new", world.store / "v1", canary=0.5).status_code == 422


def broken(world: World, name: str, change: Callable[[Path], None]) -> Path:
    folder = world.store / name
    shutil.copytree(world.store / "v1", folder)
    change(folder)
    return folder


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 100_000)


def other_golden(folder: Path) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    meta["golden"]["text"] = meta["golden"]["text"][::-1]
    (folder / META_FILE).write_text(json.dumps(meta))


def not_json(folder: Path) -> None:
    (folder / META_FILE).write_text("{")


@pytest.mark.parametrize(
    ("change", "code"),
    [(truncate, "checksum-mismatch"), (other_golden, "golden-mismatch"), (not_json, "artifact-invalid")],
)
def test_what_is_not_right_leaves_the_old_version_serving(
    world: World, change: Callable[[Path], None], code: str
) -> None:
    before = world.versions("tiny")["stable"]
    failed = metric(world.metrics_url, 'ironclip_model_loads_total{outcome="failed"}')
    assert world.put("tiny", broken(world, code, change)).status_code == 202
    standing = world.settled("tiny")
    assert standing["failed"]["failure"]["code"] == code
    assert standing["stable"] == before
    assert metric(world.metrics_url, 'ironclip_model_loads_total{outcome="failed"}') == failed + 1
    assert code in world.service.log.read_text()
    with world.client("caller") as client:
        assert world.agrees(world.ask(client, 1).json(), 1)


def test_a_pinned_digest_is_held_to(world: World) -> None:
    before = world.versions("tiny")["stable"]
    wrong = world.put("tiny", world.store / "v1", digest="0" * 64)
    assert (wrong.status_code, wrong.headers["Location"]) == (202, "/models/tiny")
    standing = world.settled("tiny")
    assert (standing["failed"]["failure"]["code"], standing["stable"]) == ("checksum-mismatch", before)
    # What is served is not loaded again: at once where the digest is given, else when it has been seen.
    assert world.put("tiny", before["spec"], digest=before["digest"]).status_code == 200
    assert "failed" not in world.versions("tiny")
    assert world.put("tiny", before["spec"]).status_code == 202
    assert world.settled("tiny")["stable"] == before


def test_only_an_administrator_changes_what_is_served(world: World) -> None:
    with world.client("caller") as client:
        for method, path in (
            ("PUT", "/models/tiny"),
            ("DELETE", "/models/tiny"),
            ("POST", "/models/tiny/promote"),
            ("DELETE", "/models/tiny/canary"),
        ):
            answer = client.request(method, path, json={"spec": str(world.store / "v1")})
            assert (answer.status_code, answer.json()["code"]) == (403, "scope-missing"), (method, path)
        assert client.get("/models/tiny").status_code == 200
    assert httpx.put(f"{world.service.url}/models/tiny", json={"spec": "demo"}).status_code == 401


def test_specs_do_not_lead_out_of_what_is_allowed(world: World) -> None:
    secret = world.root / "outside" / "secret"
    (world.folder / ".link").symlink_to(secret)
    refused = [
        secret,
        f"local-dir:{secret}",
        world.folder / ".." / "outside" / "secret",
        os.path.relpath(secret),
        world.folder / ".link",
        world.root / "nowhere",
        "/etc",
        "~root",
        "ViT-B-32/openai",
        "hf-hub:acme/robust",
        "service",
        "\0",
        "x" * 4096,
    ]
    texts = set()
    for spec in refused:
        answer = world.put("tiny", spec)
        assert (answer.status_code, answer.json()["code"]) == (403, "encoder-spec-forbidden"), spec
        texts.add(answer.json()["detail"])
    assert len(texts) == 1, "the answer tells what is there"
    assert world.put("tiny", world.folder / "nothing").status_code == 422
    (world.folder / ".link").unlink()


def test_nonsense_leaves_nothing_behind(world: World) -> None:
    def series() -> set[str]:
        text = httpx.get(f"{world.metrics_url}/metrics").text
        return {line.rpartition(" ")[0] for line in text.splitlines() if 'encoder="' in line or "model_info{" in line}

    before, names = series(), set(world.versions("tiny"))
    with world.client() as client:
        for i in range(100):
            name = ["tiny", f"n{i}", "UPPER", "default", "%2e%2e", "x" * 65][i % 6]
            body = [
                {},
                {"spec": ""},
                {"spec": f"/nowhere/{i}"},
                {"spec": "demo", "canary": 1.5},
                {"spec": "demo", "digest": "x"},
                {"spec": "demo", "defence": "nothing"},
                {"spec": "demo", "more": 1},
            ][i % 7]
            answer = client.put(f"/models/{name}", json=body)
            assert 400 <= answer.status_code < 500, (name, body, answer.text)
        # Those that are let in and cannot be built: what is kept of them is bounded.
        for i in range(20):
            assert client.put(f"/models/fail{i}", json={"spec": f"random:nothing{i}"}).status_code in (202, 409)
        until(
            lambda: not any(row["versions"][0]["role"] == "coming" for row in client.get("/models").json()["pending"])
        )
        assert len(client.get("/models").json()["pending"]) <= 16
        for row in client.get("/models").json()["pending"]:
            assert client.delete(f"/models/{row['name']}").status_code == 202
        assert client.get("/models").json()["pending"] == []
    assert series() <= before
    assert set(world.versions("tiny")) == names


def test_no_memory_for_a_second_copy_is_told(world: World) -> None:
    pid = world.service.process.pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 150_000_000, hard))
    try:
        assert world.put("big", "random:ViT-L-14").status_code == 202
        standing = world.settled("big")
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
    assert standing["failed"]["failure"]["code"] == "out-of-memory"
    with world.client() as client:
        assert world.agrees(world.ask(client, 2).json(), 2)
        assert client.delete("/models/big").status_code == 202


def test_an_encoder_is_unloaded_but_not_the_last_or_the_default(world: World) -> None:
    world.load("extra", 1)
    with world.client() as client:
        assert world.agrees(world.ask(client, 3, "extra").json(), 3)
        assert client.delete("/models/tiny").json()["code"] == "encoder-in-use"
        assert client.delete("/models/default").json()["code"] == "encoder-in-use"
        assert client.delete("/models/extra").status_code == 202
        until(lambda: client.get("/models/extra").status_code == 404)
        assert world.ask(client, 3, "extra").status_code == 404
        assert client.delete("/models/extra").status_code == 404
    assert 'encoder="extra"' not in httpx.get(f"{world.metrics_url}/metrics").text


def test_a_watched_folder_is_followed(world: World) -> None:
    # A slow copy: nothing is taken before all of it is there.
    target, source = world.folder / "watched", world.store / "v0"
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.name != WEIGHTS_FILE:
            shutil.copy(path, target)
    weights = (source / WEIGHTS_FILE).read_bytes()
    with (target / WEIGHTS_FILE).open("wb") as file:
        for start in range(0, len(weights), len(weights) // 4 + 1):
            file.write(weights[start : start + len(weights) // 4 + 1])
            if file.tell() < len(weights):
                file.flush()
                time.sleep(0.7)  # some looks long: it rests, and is not complete
                assert world.versions("watched") == {}
    until(lambda: "stable" in world.versions("watched"))
    standing = world.versions("watched")["stable"]
    assert (standing["digest"], standing["source"]) == (world.digests[0], "folder")
    with world.client() as client:
        assert world.agrees(world.ask(client, 4, "watched").json(), 4)
    # A link in its place, as Kubernetes and rsync swap; then another behind the link.
    shutil.rmtree(target)
    target.symlink_to(world.store / "v1")
    until(lambda: world.versions("watched").get("stable", {}).get("digest") == world.digests[1])
    (world.folder / ".next").symlink_to(world.store / "v2")
    (world.folder / ".next").replace(target)
    until(lambda: world.versions("watched")["stable"]["digest"] == world.digests[2])
    # Broken: the old one stays. Gone: so is the encoder.
    (world.folder / ".next").symlink_to(world.store / "golden-mismatch")
    (world.folder / ".next").replace(target)
    until(lambda: "failed" in world.versions("watched"))
    assert world.versions("watched")["stable"]["digest"] == world.digests[2]
    # The old one put back is served already: nothing of the failure is left that would be tried again.
    (world.folder / ".next").symlink_to(world.store / "v2")
    (world.folder / ".next").replace(target)
    until(lambda: "failed" not in world.versions("watched"))
    assert world.versions("watched")["stable"]["digest"] == world.digests[2]
    target.unlink()
    until(lambda: world.versions("watched") == {})


@pytest.mark.slow
def test_what_is_under_way_when_it_is_killed_is_there_after_a_start(world: World) -> None:
    """A kill -9 in the middle of a load leaves nothing that keeps the next start from serving the same."""
    shutil.copytree(world.store / "v1", world.folder / "kept")
    assert world.put("tiny", world.store / "v1").status_code == 202
    world.service.process.kill()
    world.service.process.wait()
    world.service = launch_service(world.root, **world.settings)
    try:
        world.service.wait_ready()
        assert world.versions("tiny")["stable"]["digest"] == world.digests[0]
        assert world.versions("kept")["stable"]["digest"] == world.digests[1]
    finally:
        world.service.stop()


def test_a_version_goes_from_state_to_state_in_one_order() -> None:
    version = Version("x", "demo", "demo", "api", None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        version.to("ready")
    for state in ("verifying", "warming", "ready", "draining"):
        version.to(state)
    assert set(NEXT) == {state for following in NEXT.values() for state in following} | {"loading"}

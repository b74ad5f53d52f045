"""The client against a real service: pictures from anywhere, every form, outcomes of each picture, label sets."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ironclip_client.many
import ironclip_client.vectors
import numpy as np
import pytest
from ironclip_client import (
    AsyncClient,
    Batch,
    Classification,
    Client,
    Conflict,
    ImageError,
    InvalidRequest,
    IronclipError,
    LabelError,
    NotFound,
    NotReady,
    TooLarge,
    UnexpectedAnswer,
    UsageError,
)
from ironclip_client.following import Following
from ironclip_client.images import Encoded
from ironclip_client.many import Shares
from ironclip_client.sending import Config
from PIL import Image

from tests.clients.gateway import Fault, Gateway
from tests.service.conftest import ServiceProcess

LABELS = ["carrot", "rocket", "cat face"]
JUNK = b"\x89PNG\r\n\x1a\n and no more"


def scores(answer: Classification) -> dict[str, float]:
    return {one.label: one.score for one in answer.predictions}


def test_a_picture_comes_from_anywhere(client: Client, samples: Path) -> None:
    path = samples / "carrot.png"
    data = path.read_bytes()
    expected = client.classify(path, LABELS)
    assert set(scores(expected)) == set(LABELS)
    with path.open("rb") as file:
        others: list[Any] = [str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file]
        others += ["data:image/png;base64," + base64.b64encode(data).decode(), Image.open(path)]
        for other in others:
            assert scores(client.classify(other, LABELS)) == scores(expected), type(other)


def test_a_picture_of_pillows_is_what_its_file_is(client: Client, tmp_path: Path) -> None:
    """Its orientation counts as it does in the file; CMYK is sent though PNG has none."""
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((90, 60), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    picture.save(turned, exif=exif)
    upright = scores(client.classify(picture, LABELS))
    assert scores(client.classify(Image.open(turned), LABELS)) == scores(client.classify(turned, LABELS)) != upright
    assert client.classify(picture.convert("CMYK"), LABELS).predictions
    with pytest.raises(UsageError, match="mode F"):
        client.classify(Image.new("F", (8, 8)), LABELS)


def test_each_form_gives_the_same_answer(client: Client, gateway: Gateway, samples: Path) -> None:
    """The bare picture, a form where the address would be too long, and JSON for what a form cannot say."""
    path = samples / "octopus.png"
    many = [f"label number {i:03}" for i in range(200)]
    forms: list[Any] = [LABELS, many, [{"name": one, "prompts": [f"an emoji of {one}"]} for one in LABELS]]
    answers = [client.classify(path, labels, top_k=200, defence={"name": "none"}) for labels in forms]
    kinds = [one.headers["content-type"].partition(";")[0] for one in gateway.seen]
    assert kinds == ["image/png", "multipart/form-data", "application/json"]
    assert scores(answers[0]) == scores(answers[2])
    assert len(answers[1].predictions) == 200
    assert answers[1].predictions == client.classify(path, [{"name": one} for one in many], top_k=200).predictions
    several = client.classify(images=[path], labels=LABELS)
    assert several.raise_for_error() == [answers[0]]


def test_options_mean_the_same_in_every_form(client: Client, samples: Path) -> None:
    tree = {"parents": {"carrot": "thing", "rocket": "thing", "cat face": "animal"}, "levels": ["label", "kind"]}
    asked: dict[str, Any] = {"tree": tree, "levels": "rollup", "templates": ["{} here", "a {}"], "top_k": 2}
    bare = client.classify(samples / "rocket.webp", LABELS, **asked)
    objects = client.classify(samples / "rocket.webp", [{"name": one} for one in LABELS], **asked)
    assert bare == objects
    assert {one.label for one in bare.levels["kind"]} == {"thing", "animal"}
    with pytest.raises(LabelError, match="named 'no-such-list'"):
        client.classify(samples / "rocket.webp", LABELS, templates="no-such-list")


def test_one_bad_picture_fails_alone(client: Client, samples: Path) -> None:
    answers = client.classify(images=[samples / "carrot.png", JUNK, samples / "pizza.jpg"], labels=LABELS)
    assert isinstance(answers, Batch)
    assert [isinstance(one, Classification) for one in answers] == [True, False, True]
    error = answers.errors[1]
    assert isinstance(error, ImageError)
    assert error.code == "image-invalid"
    assert error.errors[0].pointer == "/images/1"
    with pytest.raises(ImageError) as raised:
        answers.raise_for_error()
    assert raised.value is error
    assert "1 failed" in repr(answers)
    with pytest.raises(ImageError):
        client.classify(JUNK, LABELS)


def test_embeddings_are_exact_and_of_length_one(client: Client, samples: Path) -> None:
    exact = client.embed(images=[samples / "carrot.png", JUNK], texts=["a carrot", ""])
    assert exact.images.errors.keys() == exact.texts.errors.keys() == {1}
    with pytest.raises(ImageError):
        _ = exact.image_vectors
    vector = exact.images[:1].raise_for_error()[0].vector
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    rounded = client.embed(images=[samples / "carrot.png"], encoding_format="float").image_vectors
    assert rounded.shape == (1, exact.dim)
    np.testing.assert_allclose(rounded[0], vector, atol=1e-6)
    assert client.embed(texts=["a carrot"]).image_vectors.shape == (0, exact.dim)


def test_vectors_of_every_dtype(client: Client, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}
    asked: dict[str, Any] = {"images": [samples / "carrot.png", samples / "penguin.png"]}
    arrays = {}
    for name, dtype in dtypes.items():
        found = client.embed(**asked, embed_dtype=name)
        arrays[name] = vectors = found.image_vectors
        assert found.embed_dtype == name
        assert vectors.dtype == found.text_vectors.dtype == dtype
        assert vectors.shape == (2, found.text_vectors.shape[1])
    np.testing.assert_array_equal(np.unpackbits(arrays["binary"], axis=1), arrays["float32"] > 0)
    # As it is documented: int8 in a wider type, over the lengths; in binary, by the bits that differ.
    cosine = float(arrays["float32"][0] @ arrays["float32"][1])
    wide = arrays["int8"].astype(np.int32)
    lengths = np.linalg.norm(wide, axis=1)
    assert wide[0] @ wide[1] / (lengths[0] * lengths[1]) == pytest.approx(cosine, abs=0.02)
    differing = int(np.unpackbits(arrays["binary"][0] ^ arrays["binary"][1]).sum())
    assert differing == int(((arrays["float32"][0] > 0) != (arrays["float32"][1] > 0)).sum())
    monkeypatch.setattr(ironclip_client.vectors, "np", None)
    for name in dtypes:
        assert client.embed(**asked, embed_dtype=name).image_vectors == arrays[name].tolist()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([300], "int8"),
        (["a"], "float32"),
        ([], "float32"),
        ("", "float32"),
        ("AAA=", "float32"),
        ([1.0], "float8"),
        (1, "int8"),
    ],
)
def test_vectors_that_are_none_are_an_error_of_the_client(value: object, dtype: str) -> None:
    with pytest.raises(UnexpectedAnswer):
        ironclip_client.vectors.decode_vector(value, dtype)


def test_vectors_are_lists_without_numpy(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = client.embed(texts=["a", "b"]).text_vectors
    monkeypatch.setattr(ironclip_client.vectors, "np", None)
    assert client.embed(texts=["a", "b"]).text_vectors == arrays.tolist()
    assert client.embed(texts=["a"], encoding_format="float").text_vectors[0] == pytest.approx(
        arrays[0].tolist(), abs=1e-6
    )


def test_label_sets_are_replaced_only_as_expected(client: Client, samples: Path) -> None:
    first = client.label_sets.put("client-test", LABELS, templates=["a {}"], only_new=True)
    assert client.classify(samples / "carrot.png", label_set="client-test").label_set.reference == first.reference
    with pytest.raises(Conflict):
        client.label_sets.put("client-test", ["x"], only_new=True)
    second = client.label_sets.put("client-test", [{"name": "x", "prompts": ["an x"]}], if_match=first)
    with pytest.raises(Conflict):
        client.label_sets.put("client-test", ["y"], if_match=first)
    with pytest.raises(Conflict):
        client.label_sets.delete("client-test", if_match=first.digest)
    assert client.label_sets.get("client-test", if_none_match=second) is None
    newest = client.label_sets.get("client-test")
    assert (newest.digest, newest.names) == (second.digest, ("x",))
    assert client.label_sets.get(first.reference).names == tuple(LABELS)
    assert second in client.label_sets.list()
    client.label_sets.delete("client-test", if_match=newest)
    with pytest.raises(NotFound):
        client.label_sets.get("client-test")


def test_wrong_calls_are_told_before_anything_is_sent(client: Client, gateway: Gateway, samples: Path) -> None:
    path: Any = samples / "carrot.png"
    wrong: list[tuple[str, Any]] = [
        ("did you mean 'top_k'", lambda: client.classify(path, LABELS, topk=1)),  # type: ignore[call-overload]
        ("one of|Give one", lambda: client.classify(path, LABELS, images=[path])),  # type: ignore[call-overload]
        ("images=", lambda: client.classify([path], LABELS)),  # type: ignore[call-overload]
        ("labels=", lambda: client.classify(path, "carrot")),
        ("labels=", lambda: client.classify(path)),
        ("not both", lambda: client.classify(path, LABELS, label_set="emoji")),
        ("download", lambda: client.classify("https://example.org/x.png", LABELS)),
        ("binary", lambda: client.classify(io.StringIO("x"), LABELS)),  # type: ignore[call-overload]
        ("Unicode", lambda: client.classify(path, ["\ud800"])),
        ("Unicode", lambda: client.embed(texts=["\ud800"])),
        ("finite", lambda: client.probe(path, LABELS, eps=[float("nan")])),
        ("request_id", lambda: client.models(request_id="a b")),
        ("timeout", lambda: client.models(timeout=0)),
        ("images", lambda: client.embed()),
        ("concurrency", lambda: client.classify_many([path], LABELS, concurrency=0)),
        ("name", lambda: client.label_sets.get("..")),
        ("only_new", lambda: client.label_sets.put("a", LABELS, if_match="x", only_new=True)),
    ]
    for said, call in wrong:
        with pytest.raises(UsageError, match=said):
            call()
    with pytest.raises(FileNotFoundError):
        client.classify("no-such-file.png", LABELS)
    assert not gateway.seen


def test_where_and_with_what_it_is_asked(
    gateway: Gateway, samples: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IRONCLIP_URL", gateway.url + "/")
    monkeypatch.setenv("IRONCLIP_API_KEY", "ick_a_secret\n")
    with Client(timeout=7, headers={"X-Team": "search"}) as client:
        answer = client.classify(samples / "carrot.png", LABELS, request_id="my-request-1")
        assert "secret" not in repr(client) + repr(vars(client))
        with pytest.raises(NotFound, match="request my-request-2") as raised:
            client.model("no-such-model", request_id="my-request-2")
    assert answer.meta.request_id == "my-request-1"
    assert raised.value.request_id == "my-request-2"
    headers = gateway.seen[0].headers
    assert headers["authorization"] == "Bearer ick_a_secret"
    assert headers["x-team"] == "search"
    assert 5000 < int(headers["x-request-timeout-ms"]) < 7000
    assert headers["user-agent"].startswith("ironclip-client/")
    assert "secret" not in caplog.text
    for url in ("ftp://x", "127.0.0.1:8000", "http://me:hunter2@host", "http://h/?a=1", "http://"):
        with pytest.raises(UsageError, match="address") as refused:
            Client(url)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(UsageError, match="API key"):
        Client(gateway.url, api_key="two words")


def test_below_a_path_and_before_something_else(client: Client, gateway: Gateway) -> None:
    with Client(gateway.url + "/nothing/here") as lost, pytest.raises(NotFound):
        lost.models()
    gateway.faults.append(Fault(200, body=b"<html>Welcome</html>"))
    with pytest.raises(UnexpectedAnswer, match="Ironclip service"):
        client.models()
    gateway.faults.append(Fault(302, headers={"Location": "https://elsewhere.example/"}))
    with pytest.raises(UnexpectedAnswer, match="302"):
        client.models()


def test_models_and_readiness(client: Client, gateway: Gateway) -> None:
    models = client.models()
    assert [one.name for one in models.models] == ["tiny"]
    assert (models.default, models.models[0].dim) == ("tiny", 32)
    assert models.limits["max_images"] == 64
    assert client.model() == models.models[0]
    assert client.ready()
    client.wait_ready(5)
    gateway.faults.append(Fault(503, body=b'{"status": "unavailable", "reason": "draining"}'))
    state = client.ready()
    assert (bool(state), state.reason) == (False, "draining")
    # While pods are exchanged a gateway has nobody to ask; that is no reason to give up.
    gateway.faults += [Fault(502, body=b"<h1>Bad gateway</h1>") for _ in range(2)]
    assert not client.ready()
    client.wait_ready(5)
    with Client("http://127.0.0.1:9") as nobody:
        assert not nobody.ready()
        with pytest.raises(NotReady, match="refused"):
            nobody.wait_ready(0.3)


def test_many_pictures_come_in_order_and_are_read_as_needed(client: Client, samples: Path) -> None:
    pulled = 0

    def endless() -> Iterator[Any]:
        nonlocal pulled
        for name in itertools.cycle(["carrot.png", "missing.png", "pizza.jpg"]):
            pulled += 1
            yield samples / name if pulled % 5 else JUNK

    expected = {name: scores(client.classify(samples / name, LABELS)) for name in ("carrot.png", "pizza.jpg")}
    names = itertools.cycle(["carrot.png", "missing.png", "pizza.jpg"])
    outcomes = client.classify_many(endless(), LABELS, concurrency=2, batch=3)
    for i, outcome in enumerate(itertools.islice(outcomes, 40), start=1):
        name = next(names)
        assert pulled - i <= 2 * 2 * 3
        if i % 5 and name != "missing.png":
            assert isinstance(outcome, Classification)
            assert scores(outcome) == expected[name]
        else:
            assert isinstance(outcome, ImageError)
            assert bool(outcome.problem) == (i % 5 == 0)
    outcomes.close()  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest):
        list(client.classify_many([samples / "carrot.png"], ["same", "same"]))


def test_many_large_pictures_go_in_requests_that_the_service_takes(
    start_service: Callable[..., ServiceProcess], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is allowed, and all that would go together are not: none is lost, and none that comes after them."""
    service = start_service(encoders=f"tiny={tiny_artifact}", max_body_bytes=150_000, probes=0)
    pictures = [noise(seed, 120) for seed in range(9)]
    assert 40_000 < len(pictures[0]) < 60_000

    async def asynchronously() -> list[Any]:
        async with AsyncClient(service.url) as other:
            return [outcome async for outcome in other.classify_many(pictures, LABELS)]

    with Client(service.url) as client:
        one = [scores(client.classify(picture, LABELS)) for picture in pictures]
        for found in (list(client.classify_many(pictures, LABELS)), asyncio.run(asynchronously())):
            assert [scores(outcome) for outcome in found] == one
        # One that no request can hold keeps none of the others from its answer; cut beforehand, or where it is refused.
        mixed = [pictures[0], noise(10, 260), pictures[1]]
        for most in (100_000, 1 << 30):
            monkeypatch.setattr(ironclip_client.many, "_MOST_BYTES", most)
            first, large, last = client.classify_many(mixed, LABELS)
            assert isinstance(large, TooLarge)
            assert [scores(outcome) for outcome in (first, last) if isinstance(outcome, Classification)] == one[:2]


def test_a_request_that_is_too_large_for_its_labels_is_not_the_pictures_fault() -> None:
    shares: Shares[str] = Shares([Encoded(b"a", "image/png"), Encoded(b"b", "image/png")])
    shares.next()
    shares.refused(TooLarge("too many labels"))  # it cannot be told yet
    assert shares.next() == [Encoded(b"a", "image/png")]
    with pytest.raises(TooLarge, match="labels"):
        shares.refused(TooLarge("too many labels"))


def test_answers_that_do_not_fit_the_pictures_are_not_given_to_any() -> None:
    shares: Shares[str] = Shares([Encoded(b"a", "image/png"), Encoded(b"b", "image/png")])
    assert len(shares.next()) == 2
    for answers in (["one"], ["one", "two", "three"]):
        with pytest.raises(UnexpectedAnswer, match="2 pictures were sent"):
            shares.answered(answers)


def noise(seed: int, side: int) -> bytes:
    """A PNG of about 3 bytes a pixel."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["path", "file"])
def test_what_cannot_be_read_is_its_own_error(client: Client, samples: Path, kind: str) -> None:
    closed = (samples / "carrot.png").open("rb")
    closed.close()
    bad: Any = "carrot\0.png" if kind == "path" else closed
    with pytest.raises(UsageError):
        client.classify(bad, LABELS)
    first, second = client.classify_many([bad, samples / "carrot.png"], LABELS)
    assert (isinstance(first, ImageError), isinstance(second, Classification)) == (True, True)


def test_a_header_goes_once_however_it_is_written() -> None:
    given = {"user-agent": "mine", "AUTHORIZATION": "Bearer x", "X-Mine": "1"}
    headers = Config.read("http://h", "ick_a", 30, 0, given).headers
    assert {name.lower(): value for name, value in headers.items()} == {
        "accept": "application/json",
        "authorization": "Bearer ick_a",
        "user-agent": "mine",
        "x-mine": "1",
    }
    assert len(headers) == 4
    asked = Following(Config.read("http://h", None, 30, 0, None), 30, "a").request()["headers"]
    assert asked.get_list("accept") == ["text/event-stream"]


def test_the_asynchronous_client_answers_alike(client: Client, gateway: Gateway, samples: Path) -> None:
    pictures = [samples / "carrot.png", JUNK, samples / "pizza.jpg", "missing.png"]

    async def ask() -> tuple[Any, ...]:
        async with AsyncClient(gateway.url) as other:
            one, several, embedded, models = await asyncio.gather(
                other.classify(pictures[0], LABELS),
                other.classify(images=pictures[:3], labels=LABELS),
                other.embed(images=pictures[:1], texts=["x"]),
                other.models(),
            )
            many = [outcome async for outcome in other.classify_many(pictures, LABELS, batch=2, concurrency=2)]
            await other.label_sets.put("async-test", LABELS)
            await other.label_sets.delete("async-test")
            with pytest.raises(NotFound):
                await other.label_sets.get("async-test")
            return one, several, embedded, models, many, await other.ready()

    one, several, embedded, models, many, ready = asyncio.run(ask())
    assert one == client.classify(pictures[0], LABELS)
    assert several[2] == client.classify(pictures[2], LABELS) == many[2]
    assert [isinstance(outcome, IronclipError) for outcome in many] == [False, True, False, True]
    assert embedded == client.embed(images=pictures[:1], texts=["x"])
    assert models == client.models()
    assert ready


def test_errors_survive_pickling(client: Client) -> None:
    with pytest.raises(NotFound) as raised:
        client.model("nope")
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.code, again.status) == (str(raised.value), "encoder-not-found", 404)


def test_what_is_shown_is_short(client: Client, samples: Path) -> None:
    answer = client.classify(samples / "carrot.png", LABELS)
    assert re.fullmatch(r"<Classification (\S.* 0\.\d{3}(, )?){3} by tiny>", repr(answer))
    assert len(repr(client.embed(texts=["a"]))) < 80

"""Forms and bare pictures: what they may hold is what the settings say, and a text is read as what it is or refused."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import BodyMalformed
from service.form_parts import Part, read_parts
from service.settings import Settings
from tests.service.conftest import picture, until

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def app(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("forms")
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=folder, max_texts=5)
    with TestClient(create_app(settings)) as client:
        until(lambda: client.get("/readyz").status_code == 200, 60)
        yield client


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """A form of fields; each begins with its Content-Disposition's parameters."""
    return (
        b"".join(
            b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (about.encode("latin-1"), body)
            for about, body in parts
        )
        + end
    )


def post(client: Any, body: bytes, path: str = "/classify") -> httpx.Response:
    answer: httpx.Response = client.post(
        path, content=body, headers={"content-type": "multipart/form-data; boundary=b"}
    )
    return answer


IMAGE = ('name="image"; filename="a.png"', picture(1))


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), answer.text
    return problem


def test_a_form_says_which_of_its_fields_are_too_many_and_which_setting_says_so(app: TestClient) -> None:
    many = [("name=labels", b"label %d" % i) for i in range(10_001)]
    problem = refused(post(app, form(IMAGE, *many)), 422, "labels-too-many")
    assert problem["limit"] == 1000
    assert "IRONCLIP_MAX_LABELS" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/labels"
    assert post(app, form(IMAGE, *many[:1000])).status_code == 200
    problem = refused(post(app, form(IMAGE, *[("name=texts", b"x")] * 6), "/embed"), 413, "input-too-large")
    assert problem["limit"] == 5
    assert "IRONCLIP_MAX_TEXTS" in problem["detail"]
    problem = refused(post(app, form(*[IMAGE] * 65)), 413, "input-too-large")
    assert problem["limit"] == 64
    assert "IRONCLIP_MAX_IMAGES" in problem["detail"]
    # A picture as a text is one too.
    text = base64.b64encode(picture(1))
    assert refused(post(app, form(*[("name=images", text)] * 65)), 413, "input-too-large")["limit"] == 64
    problem = refused(post(app, form(IMAGE, *[("name=eps", b"1")] * 5000)), 413, "input-too-large")
    assert problem["limit"] == 4096


def test_a_picture_as_a_text_may_be_as_large_as_one_in_json(app: TestClient) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    text = base64.b64encode(_as_png(noise))
    assert len(text) > 5_000_000
    answer = post(app, form(("name=image", text), ("name=labels", b"a"), ("name=labels", b"b")))
    assert answer.status_code == 200, answer.text
    known = app.post("/classify", json={"image": text.decode(), "labels": ["a", "b"]}).json()
    assert answer.json()["predictions"] == known["predictions"]
    problem = refused(post(app, form(("name=image", b"A" * (23 << 20)), ("name=labels", b"a"))), 413, "image-too-large")
    assert problem["limit"] == 16 << 20


def _as_png(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def test_texts_that_are_not_utf_8_are_refused_not_guessed(app: TestClient) -> None:
    cyrillic = "кот".encode("cp1251")
    for about, body in (("name=labels", cyrillic), (f'name="{cyrillic.decode("latin-1")}"', b"x")):
        problem = refused(post(app, form(IMAGE, (about, body))), 400, "body-malformed")
        assert "UTF-8" in problem["detail"]
    right = post(app, form(IMAGE, ("name=labels", "кот".encode()), ("name=labels", b"b")))
    assert {one["label"] for one in right.json()["predictions"]} == {"кот", "b"}
    # Bytes without a filename are no file; they are told apart from a picture that is broken.
    problem = refused(post(app, form(("name=image", picture(1)), ("name=labels", b"a"))), 400, "body-malformed")
    assert "filename" in problem["detail"]


def test_a_query_that_is_not_utf_8_is_refused_not_guessed(app: TestClient) -> None:
    for query in ("labels=caf%E9&labels=b", "labels=a&%FF=1"):
        problem = refused(app.post(f"/classify?{query}", content=picture(1), headers=PNG), 400, "body-malformed")
        assert "query" in problem["detail"]
    right = app.post("/classify?labels=caf%C3%A9&labels=b+c&labels=", content=picture(1), headers=PNG)
    assert refused(right, 422, "labels-invalid")["errors"][0]["pointer"] == "/labels/2"  # what is blank is there
    right = app.post("/classify?labels=caf%C3%A9&labels=b+c", content=picture(1), headers=PNG)
    assert {one["label"] for one in right.json()["predictions"]} == {"café", "b c"}


def test_a_form_that_is_cut_off_or_has_no_names_is_refused(app: TestClient) -> None:
    whole = form(IMAGE, ("name=labels", b"a"), ("name=labels", b"b"))
    assert post(app, whole).status_code == 200
    assert post(app, whole + b"whatever comes behind").status_code == 200
    for body in (whole[:-30], whole[: len(whole) // 2], b"", form(IMAGE, ("filename=x", b"a")), b"x" + whole):
        refused(post(app, body), 400, "body-malformed")
    refused(post(app, form()), 422, "request-invalid")


def test_a_form_of_many_parts_leaves_others_their_turns() -> None:
    body = form(*[("name=labels", b"label %d" % i) for i in range(10_000)])

    async def read() -> tuple[list[Part], int]:
        turns, done = 0, False

        async def other() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        parts = await read_parts(_request(body), {"labels": (10_000, "")})
        done = True
        await task
        return parts, turns

    parts, turns = asyncio.run(read())
    assert [part.take_text() for part in parts] == [f"label {i}" for i in range(10_000)]
    assert turns > 10


@pytest.mark.parametrize("size", [1, 7, 61, 8192, 8193])
def test_it_does_not_matter_where_a_form_is_cut_into_pieces(size: int) -> None:
    data = b"\r\n--b\r" + picture(2) + b"\r\n--"
    body = form(('name="image"; filename=""', data), ("name=labels", "é".encode()), ("name=empty", b""))
    parts = asyncio.run(read_parts(_request(body, size), {}))
    assert [(part.name, part.is_file, part.take()) for part in parts] == [
        ("image", True, data),
        ("labels", False, "é".encode()),
        ("empty", False, b""),
    ]


def test_a_form_needs_a_boundary_and_utf_8() -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=b; charset=idna"):
        with pytest.raises(BodyMalformed):
            asyncio.run(read_parts(_request(form(IMAGE), kind=kind), {}))


def _request(body: bytes, size: int = 1 << 30, kind: str = "multipart/form-data; boundary=b") -> Request:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    return Request({"type": "http", "headers": [(b"content-type", kind.encode())]}, receive)

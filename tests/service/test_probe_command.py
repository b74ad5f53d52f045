"""`python -m service probe` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from service.__main__ import main
from tests.service.conftest import picture


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "mine.png"
    path.write_bytes(picture(90))
    return path


def test_it_prints_a_curve_and_writes_pictures(
    image: Path, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "probe",
        str(image),
        "--labels",
        "cat",
        "dog",
        "cow",
        "--encoder",
        str(tiny_artifact),
        "--eps",
        "1",
        "40",
    ]
    assert main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "as it is: " in text
    assert "broken at 40 (linf, in 1/255 at 32 px)" in text
    assert "not a certificate" in text
    assert Image.open(out / "adversarial.png").size == (32, 32)
    assert Image.open(out / "perturbation.png").size == (32, 32)


def test_json_for_scripts_and_a_vector(image: Path, tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", str(image), "--embedding", "--encoder", str(tiny_artifact), "--cosine-below", "0.9", "--json"]
    assert main([*command, "--eps", "60", "--attack", '{"name": "pgd", "iterations": 30}']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "embedding"
    assert found["attack"]["options"] == {"iterations": 30, "seed": 0}
    assert found["points"][0]["cosine"] < 0.9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--labels", "cat", "--label", "dog"], "not among the 1 labels"),
        (["--labels", "cat", "--defence", "{"], "no JSON"),
        (["--labels", "cat", "--defence", "armour"], "there are: none, cola"),
        (["--label-set", "nowhere"], "there are: emoji"),
        (["--labels", "cat", "--eps", "-3"], "eps lies in 0 to 255"),
        (["--labels", "cat", "--level", "kind"], "no level"),
        (["--labels", "cat", "--encoder", "no-such"], "no-such"),
    ],
)
def test_mistakes_are_told_in_one_line(
    image: Path, tiny_artifact: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = [] if "--encoder" in options else ["--encoder", str(tiny_artifact)]
    assert main(["probe", str(image), *encoder, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error


def test_a_file_that_is_not_there_or_no_picture(
    tmp_path: Path, tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "absent.png"):
        assert main(["probe", str(tmp_path / name), "--labels", "cat", "--encoder", str(tiny_artifact)]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_options_may_stand_before_or_behind_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--markdown"]) == 0
    assert "IRONCLIP_PROBE_QUANTUM_MS" in capsys.readouterr().out
    for arguments in (["--port", "99999"], ["serve", "--port", "99999"], ["--port", "99999", "serve"]):
        assert main(arguments) == 2  # the settings say that there is no such port
        assert "IRONCLIP_PORT" in capsys.readouterr().err

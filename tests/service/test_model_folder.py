"""Canaries in a watched folder: their shares by the folders' names, promoted and ended by moving folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from ironclip.artifact import CONFIG_FILE, META_FILE, save_artifact
from ironclip.loading import load_encoder
from service.app import create_app
from service.model_loading import Loader
from service.model_sights import Role, role_of
from service.settings import Settings
from service.versions import Version, draw
from tests.conftest import make_tiny_encoder
from tests.service import conftest
from tests.service.conftest import as_base64, picture

until = partial(conftest.until, seconds=60)
LOOKS = 0.6  # seconds in which a folder is looked at a few times


@dataclass
class World:
    """A service in this process, its folder, and artifacts outside of it."""

    client: TestClient
    folder: Path
    store: Path
    digests: list[str]

    @property
    def models(self) -> Any:
        return self.client.app.state.service.models  # type: ignore[attr-defined]

    def roles(self, name: str = "main") -> dict[str, dict[str, Any]]:
        rows = self.client.get(f"/models/{name}").json().get("versions", [])
        return {row["role"]: row for row in rows}

    def serves(self, stable: int, canary: int | None = None, share: float = 0.0, name: str = "main") -> bool:
        """Whether these versions are served, and nothing comes or leaves any more."""
        found = {role: (row["digest"], row["share"]) for role, row in self.roles(name).items() if role != "failed"}
        expected = {"stable": (self.digests[stable], round(1 - share, 6))}
        if canary is not None:
            expected["canary"] = (self.digests[canary], share)
        return found == expected

    def link(self, called: str, number: int) -> None:
        """Let a name lead to an artifact, in one step."""
        (self.folder / ".next").symlink_to(self.store / f"v{number}")
        (self.folder / ".next").replace(self.folder / called)

    def move(self, called: str, other: str) -> None:
        (self.folder / called).rename(self.folder / other)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for number in range(3):
        save_artifact(make_tiny_encoder(number), root / f"v{number}", {"name": f"v{number}"})
    return root


@pytest.fixture(scope="module")
def digests(store: Path) -> list[str]:
    return [load_encoder(str(store / f"v{number}")).digest for number in range(3)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from files, in order."""
    found: list[str] = []
    load = Loader.load

    def counted(self: Loader, version: Version) -> Any:
        found.append(version.spec)
        return load(self, version)

    monkeypatch.setattr(Loader, "load", counted)
    return found


Start = Callable[..., contextlib.AbstractContextManager[World]]


@pytest.fixture
def start(store: Path, digests: list[str], tmp_path: Path) -> Start:
    folder = tmp_path / "models"
    folder.mkdir()

    @contextlib.contextmanager
    def run(**links: int) -> Iterator[World]:
        for called, number in {"main": 0, **links}.items():
            (folder / called).symlink_to(store / f"v{number}")
        settings = Settings(
            encoders={"base": str(store / "v0")},
            models_dir=folder,
            models_poll_seconds=0.1,
            dtype="float32",
            probes=False,
            state_dir=tmp_path / "state",
        )
        with TestClient(create_app(settings)) as client:
            conftest.until(lambda: client.get("/readyz").status_code == 200, 60)
            yield World(client, folder, store, digests)

    return run


def ended(outcome: str) -> float:
    return REGISTRY.get_sample_value("ironclip_canaries_ended_total", {"outcome": outcome}) or 0.0


@pytest.mark.parametrize(
    ("folder", "role"),
    [
        ("robust", Role("robust")),
        ("robust@canary=0.05", Role("robust", 0.05)),
        ("robust@canary=.5", Role("robust", 0.5)),
        ("robust-2.1@canary=0.25", Role("robust-2.1", 0.25)),
        *((wrong, None) for wrong in ("default", "default@canary=0.1", "Robust", "robust@canary", "robust@canary=")),
        *((f"robust@canary={wrong}", None) for wrong in ("0", "0.0", "1", "1.0", "5%", "-0.1", "1e-1", "nan", "0.1\n")),
        *((wrong, None) for wrong in ("@canary=0.1", "a@b@canary=0.1", "robust@other", "robust@canary=0.1@canary=0.1")),
    ],
)
def test_what_a_folders_name_says(folder: str, role: Role | None) -> None:
    assert role_of(folder) == role


def test_a_folder_makes_a_canary_moves_its_share_and_ends_it(start: Start, loads: list[str]) -> None:
    with start() as world:
        world.link("main@canary=0.25", 1)
        until(lambda: world.serves(0, 1, 0.25))
        assert world.roles()["canary"]["source"] == "folder"
        # Who gets it is drawn from the request's id alone: whichever replica is asked.
        version = Version("main", "", "", "folder", None, digest=world.digests[1])  # type: ignore[arg-type]
        body = {"image": as_base64(picture(1)), "labels": ["cat", "dog"], "encoder": "main"}
        for identity in [f"request-{i:04}" for i in range(40)]:
            answer = world.client.post("/classify", json=body, headers={"X-Request-Id": identity}).json()
            expected = world.digests[1 if draw(version, identity) < 0.25 else 0]
            assert answer["encoder"]["digest"] == expected
        before = len(loads)
        world.move("main@canary=0.25", "main@canary=0.5")
        until(lambda: world.serves(0, 1, 0.5))
        assert len(loads) == before
        # Another version in its place; and then none.
        replaced, removed = ended("replaced"), ended("removed")
        world.link("main@canary=0.5", 2)
        until(lambda: world.serves(0, 2, 0.5))
        assert ended("replaced") == replaced + 1
        (world.folder / "main@canary=0.5").unlink()
        until(lambda: world.serves(0))
        assert ended("removed") == removed + 1


@pytest.mark.parametrize("how", ["link", "rename", "copy"])
def test_a_canary_in_the_place_of_its_encoder_is_promoted_and_not_loaded_again(
    start: Start, loads: list[str], how: str
) -> None:
    with start() as world:
        folder, canary = world.folder, "main@canary=0.1"
        if how == "link":
            world.link(canary, 1)
        else:
            shutil.copytree(world.store / "v1", folder / ".new")
            world.move(".new", canary)
        until(lambda: world.serves(0, 1, 0.1))
        before, promoted = len(loads), ended("promoted")
        if how == "link":
            world.link("main", 1)
        elif how == "rename":
            (folder / "main").unlink()
            world.move(canary, "main")
        else:
            (folder / "main").unlink()
            shutil.copytree(folder / canary, folder / ".new")  # with the times of its files
            world.move(".new", "main")
            shutil.rmtree(folder / canary)
        until(lambda: world.serves(1))
        time.sleep(LOOKS)
        assert world.serves(1)
        assert (len(loads), ended("promoted")) == (before, promoted + 1)
        assert world.roles()["stable"]["spec"] == str(folder / "main")
        if how == "link":
            # The canary's link is still there: it is tried once more where the encoder goes back.
            world.link("main", 0)
            until(lambda: world.serves(0, 1, 0.1))
            (folder / canary).unlink()
            until(lambda: world.serves(0))


def test_what_cannot_be_a_canary_is_told_and_changes_nothing(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    with start() as world:
        world.link("main@canary", 1)
        world.link("nobody@canary=0.1", 1)
        world.link("main@canary=0.1", 1)
        until(lambda: world.serves(0, 1, 0.1))
        world.link("main@canary=0.2", 2)  # a second one: which is meant?
        time.sleep(LOOKS)
        assert world.serves(0, 1, 0.1)
        told = "".join(capfd.readouterr())
        for text in ("is no encoder: its name is", "no encoder of this name is served", "is a canary of it too"):
            assert text in told
        (world.folder / "main@canary=0.1").unlink()
        until(lambda: world.serves(0, 2, 0.2))
        # Of an encoder of the settings too; and it goes with an encoder that goes.
        world.link("base@canary=0.3", 1)
        until(lambda: world.serves(0, 1, 0.3, "base"))
        (world.folder / "main").unlink()
        until(lambda: world.client.get("/models/main").status_code == 404)
        world.link("main", 0)
        until(lambda: world.serves(0, 2, 0.2))


def test_a_canary_that_was_taken_out_is_not_put_back_until_its_files_change(start: Start, loads: list[str]) -> None:
    with start() as world:
        canary = world.folder / "main@canary=0.1"
        shutil.copytree(world.store / "v1", world.folder / ".new")
        world.move(".new", canary.name)
        until(lambda: world.serves(0, 1, 0.1))
        before, failed = len(loads), ended("failed")
        version = world.models._named["main"].canary
        assert world.client.portal is not None
        world.client.portal.call(world.models._ailed, version, "a worker died")
        until(lambda: world.serves(0))
        canary = canary.rename(world.folder / "main@canary=0.2")
        time.sleep(LOOKS)
        assert world.serves(0)
        assert (len(loads), ended("failed")) == (before, failed + 1)
        assert world.roles()["failed"]["failure"]["code"] == "encoder-version-lost"
        os.utime(canary / META_FILE)
        until(lambda: world.serves(0, 1, 0.2))
        # One that cannot be loaded is told, and leaves the canary as it is.
        meta = (canary / CONFIG_FILE).read_text()
        (canary / CONFIG_FILE).write_text("{}")
        until(lambda: "failed" in world.roles())
        assert world.serves(0, 1, 0.2)
        (canary / CONFIG_FILE).write_text(meta)
        until(lambda: "failed" not in world.roles())


def test_at_start_a_canary_is_there_when_the_service_is_ready(start: Start, loads: list[str]) -> None:
    with start(**{"main@canary=0.25": 1, "other": 2, "other@canary=0.5": 2, "ghost@canary=0.1": 1}) as world:
        assert world.serves(0, 1, 0.25)
        assert world.serves(2, name="other")  # it would be tried beside itself
        time.sleep(LOOKS)
        assert len(loads) == 4  # `base`, `main` with its canary, `other`


def test_a_canary_that_leaves_while_it_is_loaded_never_comes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader.load

    def slow(self: Loader, version: Version) -> Any:
        if version.share:
            time.sleep(2)
        return load(self, version)

    with start() as world:
        monkeypatch.setattr(Loader, "load", slow)
        world.link("main@canary=0.1", 1)
        until(lambda: "coming" in world.roles())
        world.move("main@canary=0.1", "main@canary=0.4")  # heeded when it has been loaded
        until(lambda: world.serves(0, 1, 0.4))
        world.link("main@canary=0.4", 2)
        until(lambda: "coming" in world.roles())
        (world.folder / "main@canary=0.4").unlink()
        until(lambda: world.serves(0))

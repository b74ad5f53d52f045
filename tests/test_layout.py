"""The walls of the house: imports run service -> ironclip <- training, and the wheel holds ironclip alone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = ("ironclip", "service", "training", "loadtests", "benchmarks")
ALLOWED = {
    "ironclip": set(),
    "service": {"ironclip"},
    "training": {"ironclip"},
    "loadtests": set(),
    "benchmarks": {"ironclip", "training"},
}
# The client is a distribution of its own, and imports nothing of the house.
CLIENT = ROOT / "clients" / "python"
WEB = {"fastapi", "starlette", "uvicorn", "redis", "pydantic"}


def _sources(package: str) -> list[Path]:
    """A package's files; hidden folders, such as the environments of the peers, are no part of it."""
    found = (ROOT / package).rglob("*.py")
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = _sources(package)
    assert files
    for path in files:
        for name in _imports(path):
            top = name.split(".")[0]
            if top in PACKAGES and top != package:
                assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"
            if package in ("ironclip", "training"):
                assert top not in WEB, f"{path.relative_to(ROOT)} imports {name}"


def test_the_client_stands_alone() -> None:
    """It imports what it declares, and needs httpx alone; NumPy and Pillow are asked for where they are wanted."""
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plain = [one for one in project["dependencies"] if "python_version" not in one]
    assert [re.split(r"[<>=]", one)[0] for one in plain] == ["httpx"]
    known = {"ironclip_client", "httpx", "typing_extensions", "numpy", "PIL"} | sys.stdlib_module_names
    files = list((CLIENT / "src").rglob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            assert name.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {name}"
    bare = (
        "import sys; sys.modules.update(dict.fromkeys(('numpy', 'PIL', 'torch', 'pydantic', 'typing_extensions')));"
        "import ironclip_client; print(ironclip_client.__version__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CLIENT / "src")}
    result = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_defences_know_nothing_of_attacks() -> None:
    files = list((ROOT / "ironclip" / "defences").rglob("*.py"))
    assert files
    for path in files:
        assert not [n for n in _imports(path) if n.startswith("ironclip.attacks")]


def test_few_modules_read_the_environment() -> None:
    for path in (ROOT / "service").rglob("*.py"):
        if path.name not in ("settings.py", "environment.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\benviron\b|\bgetenv\b", text), path


def test_every_import_is_a_declared_dependency() -> None:
    """Someone who installs an extra gets all that its code imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        "ironclip": [],
        "service": ["serve", "otel"],
        "training": ["train"],
        "loadtests": ["load", "peer-litserve", "peer-mosec", "peer-bentoml"],
        "benchmarks": ["train"],
    }
    modules = {
        "pillow": "PIL",
        "fonttools": "fontTools",
        "open_clip_torch": "open_clip",
        "POT": "ot",
        "python-multipart": "python_multipart",
        "python-mimeparse": "mimeparse",
        "opentelemetry-api": "opentelemetry",
    }
    for package, names in extras.items():
        declared = [*project["dependencies"], *(d for name in names for d in project["optional-dependencies"][name])]
        known = {re.split(r"[\[<>=;~! ]", d)[0] for d in declared}
        known = {modules.get(name, name).replace("-", "_") for name in known} | set(PACKAGES) | sys.stdlib_module_names
        for path in _sources(package):
            for name in _imports(path):
                assert name.split(".")[0] in known, f"{path.relative_to(ROOT)} imports {name}"


def _build(folder: Path, out: Path) -> tuple[Path, list[str]]:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def test_the_clients_wheel_holds_the_client_alone(tmp_path: Path) -> None:
    wheel, names = _build(CLIENT, tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ironclip_client"}
    assert "ironclip_client/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)
    assert wheel.stat().st_size < 200_000


def test_wheel_holds_ironclip_alone(tmp_path: Path) -> None:
    """`service` and `training` are names that other wheels use too; the demo must come along and stay small."""
    wheel, names = _build(ROOT, tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ironclip"}
    assert "ironclip/demo/samples/carrot.png" in names
    assert "ironclip/demo/label_sets/emoji.json" in names
    assert any(name.endswith("/licenses/NOTICE") for name in names)
    assert wheel.stat().st_size < 45_000_000

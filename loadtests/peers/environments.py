"""An environment of its own for each server, over one shared torch, and the model in the form that infinity reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loadtests.peers.registry import COMPLETE, MODELS, PEERS, VENVS, Peer
from loadtests.processes import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAST_LINES = 1500
_SECONDS = 1800
_SHARED = ".torch"  # beside the environments
_WORTH_A_LOOK = 1 << 20  # bytes of a library


def requirements(extra: str) -> list[str]:
    """What an extra of pyproject.toml asks for; one that is not a peer's is beside what all of the project needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = project["optional-dependencies"][extra]
    return found if extra.startswith("peer-") else [*project["dependencies"], *found]


def absent(peer: Peer) -> str | None:
    """Why a peer cannot be started, or None; who runs in this environment until theirs is there always can."""
    if peer.home is None:
        return None
    reason = VENVS / f"{peer.name}.absent"
    if reason.exists():
        return reason.read_text(encoding="utf-8")
    if not peer.python.exists():
        return "it is not set up: run `python -m loadtests.peers setup`"
    return None


def version_of(peer: Peer) -> str:
    """The version that is installed of a peer; the checkout's is told by its commit."""
    if not peer.distribution:
        return "this commit"
    code = f"import importlib.metadata as m; print(m.version({peer.distribution!r}))"
    done = subprocess.run([str(peer.python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def set_up(peer: Peer, arguments: Sequence[str], *, fresh: bool) -> str | None:
    """Make a peer's environment; returns why that failed, which is kept for the report, or None."""
    folder, reason = VENVS / peer.name, VENVS / f"{peer.name}.absent"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    wanted = "\n".join(requirements(peer.extra))
    if (folder / COMPLETE).exists() and (folder / COMPLETE).read_text(encoding="utf-8") == wanted:
        return None
    reason.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    # Behind its own packages on the path comes torch: pip takes it from there and leaves it as it is.
    (_site(folder) / "shared.pth").write_text(f"{VENVS / _SHARED}\n", encoding="utf-8")
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments, *requirements(peer.extra)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        fault = f"pip ended with status {done.returncode}: {done.stderr[-_LAST_LINES:]}" if done.returncode else None
    except subprocess.TimeoutExpired:
        fault = f"pip did not end within {_SECONDS} seconds"
    if fault is None:
        (folder / COMPLETE).write_text(wanted, encoding="utf-8")
    else:
        reason.write_text(fault, encoding="utf-8")
    return fault


def _site(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"))


def shared_torch() -> Path:
    """A folder with torch, torchvision and what these need, as links to this environment's."""
    shared = VENVS / _SHARED
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    for one in with_dependencies(["torch", "torchvision"]):
        if not one.files:
            raise RuntimeError(f"{one.name} does not say what its files are; install it with pip")
        for name in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            if not (shared / name).exists():
                (shared / name).symlink_to(str(one.locate_file(name)))
    return shared


def with_dependencies(names: Iterable[str]) -> list[Distribution]:
    """The distributions of these names in this environment, and of all that they need."""
    found: dict[str, Distribution] = {}
    waiting = [(name, "") for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = found.get(name) or distribution(name)
        for one in map(Requirement, found[name].requires or ()):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(one.name), wanted) for wanted in ("", *one.extras)]
    return list(found.values())


def installed_mib(peer: Peer) -> float | None:
    """What an image of it has beside Python, torch and what torch needs; None where it has no environment of its own.

    Packages, without compiled files and without what they carry for debuggers, which our images leave out too; for ours
    its code as well, and the demo encoders in it. No other weights are counted.
    """
    if peer.home is None:
        return None
    own = [path for path in _site(peer.home).iterdir() if path.name.split("-")[0] not in ("pip", "setuptools")]
    code = [] if peer.distribution else [ROOT / "ironclip", ROOT / "service"]
    return sum(_size(file) for path in (*own, *code) for file in (path, *path.rglob("*"))) / 2**20


def _size(path: Path) -> int:
    """Bytes of a file of its own that an image would have; without `strip` what is for debuggers counts too."""
    if not path.is_file() or path.suffix == ".pyc":
        return 0
    size = path.stat().st_size
    if size < _WORTH_A_LOOK or path.suffix != ".so" or shutil.which("strip") is None:
        return size
    with tempfile.NamedTemporaryFile() as stripped:
        command = ["strip", "--strip-debug", "-o", stripped.name, str(path)]
        done = subprocess.run(command, capture_output=True, check=False)
        return size if done.returncode else Path(stripped.name).stat().st_size


def export_model(model: str) -> Path:
    """The random weights as a folder that transformers' CLIPModel loads.

    Raises:
        subprocess.CalledProcessError: the export failed, and has said why.
    """
    folder = MODELS / model
    if not (folder / "preprocessor_config.json").exists():
        what = ["--encoder", f"random:{model}", "--to", "transformers", "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "training", "export", *what], cwd=ROOT, check=True)
    return folder


def set_up_all(names: Sequence[str], model: str, arguments: Sequence[str], *, fresh: bool) -> int:
    """Set the named peers up, say how it went; returns the exit status, 0 although some may be absent."""
    shared_torch()
    for name in names:
        fault = set_up(PEERS[name], arguments, fresh=fresh)
        print(f"{name}: {'absent, ' + fault if fault else version_of(PEERS[name])}", flush=True)
    if "infinity" in names:
        print(f"infinity reads {export_model(model).relative_to(ROOT)}")
    return 0

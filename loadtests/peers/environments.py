"""An environment of its own for each peer, over one shared torch; and the model in the form that transformers reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from loadtests.peers.registry import MODELS, PEERS, VENVS, Peer
from loadtests.processes import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAST_LINES = 1500
_SECONDS = 1800


def requirements(extra: str) -> list[str]:
    """What an extra of pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = project["optional-dependencies"][extra]
    return found


def absent(peer: Peer) -> str | None:
    """Why a peer cannot be started, or None."""
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
    if not peer.extra:
        return None
    folder, reason = VENVS / peer.name, VENVS / f"{peer.name}.absent"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / ".complete").exists():
        return None
    reason.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    # Behind its own packages on the path come those of this environment, torch above all: pip takes what fits from
    # there and leaves it as it is.
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [str(peer.python), "-m", "pip", "install", "--quiet", *arguments, *requirements(peer.extra)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        fault = f"pip ended with status {done.returncode}: {done.stderr[-_LAST_LINES:]}" if done.returncode else None
    except subprocess.TimeoutExpired:
        fault = f"pip did not end within {_SECONDS} seconds"
    if fault is None:
        (folder / ".complete").touch()
    else:
        reason.write_text(fault, encoding="utf-8")
    return fault


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
    for name in names:
        fault = set_up(PEERS[name], arguments, fresh=fresh)
        print(f"{name}: {'absent, ' + fault if fault else version_of(PEERS[name])}", flush=True)
    if "infinity" in names:
        print(f"infinity reads {export_model(model).relative_to(ROOT)}")
    return 0

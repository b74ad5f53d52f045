"""`make test-oldest`: the quick tests of the service with the oldest packages that pyproject.toml allows.

They go into an environment of their own, build/oldest. What the tests need beside the service, and torch, whose oldest
release is a download of gigabytes, are those of the environment that this runs in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "oldest"
TOOLS = ("pytest", "pytest-timeout", "httpx", "hypothesis", "jsonschema-rs", "trustme", "pyyaml")
TESTS = ("tests/service/test_app.py", "tests/service/test_classify.py")
# Older versions of FastAPI and Pydantic write the same document in other words.
LEFT_OUT = "test_the_committed_openapi_document_is_current"
_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")


def main() -> int:
    """Make the environment and run the tests, or those that are named; returns pytest's status."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pins = _resolve()
    (FOLDER / "packages.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    environment = FOLDER / "venv"
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--requirement", str(FOLDER / "packages.txt")], check=True)
    _link_torch(python)
    tests = sys.argv[1:] or list(TESTS)
    command = [str(python), "-m", "pytest", *tests, f"--deselect=tests/service/test_app.py::{LEFT_OUT}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


def _resolve() -> list[str]:
    """The lowest version of each direct dependency, what these ask for, and the tools; without torch."""
    here = FOLDER / "here.txt"
    here.write_text("".join(f"{name}=={version(name)}\n" for name in TOOLS), encoding="utf-8")
    torch = FOLDER / "torch.txt"
    # Without the build's name (+cu130), which no index lists.
    torch.write_text("".join(f"{n}=={version(n).split('+')[0]}\n" for n in ("torch", "torchvision")), encoding="utf-8")
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", str(here), "--extra=serve"]
    command += ["--extra=otel", "--resolution=lowest-direct", f"--constraint={torch}", f"--python={sys.executable}"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line and not _TORCH.match(line)]


def _link_torch(python: Path) -> None:
    """Let the new environment see this one's torch, and nothing else of it."""
    links = FOLDER / "torch"
    links.mkdir(exist_ok=True)
    purelib = Path(sysconfig.get_path("purelib"))
    for path in purelib.iterdir():
        name = path.name.lower()
        if re.match(r"(torch|torchvision|torchgen|functorch|triton|nvidia|cuda)([._-]|$)", name):
            link = links / path.name
            if not link.is_symlink():
                link.symlink_to(path)
    shown = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (Path(shown.stdout.strip()) / "torch.pth").write_text(f"{links}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

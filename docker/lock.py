"""`make lock`: write docker/locks anew, what the images install, resolved by uv for every Linux machine at once.

A lock is what pip reads: exact versions, markers, and the SHA-256 of each file, which is the same on every index.
No index is named in it. torch and what its CUDA build brings lie apart: which build it is depends on the image.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
# The versions that this repository's numbers were measured with: a newer one is a decision, not an accident.
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
# The oldest Python of a base image that the locks hold for: that of Debian 12.
PYTHON = "3.11"
EXTRAS = {"service": ("serve", "otel"), "training": ("train",)}
# Where the CPU builds are, with files of their own under the same versions; the Dockerfiles' default.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_LINK = re.compile(r"""href=["']([^"'#]+)#sha256=([0-9a-f]{64})""")
_CUDA_BUILD = re.compile(r"(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
_HEAD = "# Written by `make lock` (docker/lock.py) from pyproject.toml; not by hand. {0}\n"


def main() -> int:
    """Write the locks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docker/locks anew from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="newest versions, not those that the locks have")
    parser.add_argument("--torch-index", default=CPU_INDEX, metavar="URL", help="of the CPU builds of torch")
    arguments = parser.parse_args()
    kept = [] if arguments.upgrade else _pins()
    found = {name: _resolve(extras, [*TORCH, *kept]) for name, extras in EXTRAS.items()}
    for name, packages in found.items():
        common = [package for package in packages if not _CUDA_BUILD.match(package)]
        _write(name, f"All of the extras {' and '.join(EXTRAS[name])} but torch.", common)
    built = [package for package in found["service"] if _CUDA_BUILD.match(package)]
    _write("torch-cuda", "torch with CUDA, for service and training.", built)
    try:
        _write("torch-cpu", "torch without CUDA.", [_cpu_builds(arguments.torch_index, pin) for pin in TORCH])
    except LookupError as error:
        print(f"{error}; docker/locks/torch-cpu.txt has {_keep_or_pin()}", file=sys.stderr)
    return 0


def _pins() -> list[str]:
    """What the locks that are there have pinned, without torch."""
    lines = [line for path in sorted(LOCKS.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]
    pins = {line.removesuffix(" \\").strip() for line in lines if re.match(r"[a-z0-9]", line)}
    return sorted(pin for pin in pins if not _CUDA_BUILD.match(pin))


def _resolve(extras: Sequence[str], constraints: list[str]) -> list[str]:
    """The packages of these extras as blocks of lines, hashes included."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal"]
        command += [
            *(f"--extra={extra}" for extra in extras),
            f"--python-version={PYTHON}",
            f"--constraint={file.name}",
            "--generate-hashes",
        ]
        command += ["--no-annotate", "--no-header", "--quiet"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return re.split(r"\n(?=\S)", done.stdout.strip())


def _cpu_builds(index: str, pin: str) -> str:
    """The pin with the hashes of all its Linux wheels in an index of CPU builds.

    Raises:
        LookupError: the index cannot be reached, or tells no hashes of this version.
    """
    name, version = pin.split("==")
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/{name}/", timeout=60) as answer:
            page = answer.read().decode()
    except OSError as error:
        raise LookupError(f"{index} cannot be reached ({error})") from None
    hashes = set()
    for link, digest in _LINK.findall(page):
        try:
            _, found, _, tags = parse_wheel_filename(unquote(urlsplit(link).path).rsplit("/", 1)[-1])
        except InvalidWheelFilename:
            continue
        # Its files are called 2.14.1+cpu, which a pin of 2.14.1 takes; a mirror's may not be.
        if found.public == version and any("linux" in tag.platform for tag in tags):
            hashes.add(digest)
    if not hashes:
        raise LookupError(f"{index} has no hashes of {pin}")
    return " \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in sorted(hashes))])


def _keep_or_pin() -> str:
    """Leave the hashes that the lock of the CPU builds has of these versions, or pin by version; says which."""
    path = LOCKS / "torch-cpu.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if "--hash" in "".join(lines) and {f"{pin} \\" for pin in TORCH} <= set(lines):
        return "the hashes that it had"
    _write("torch-cpu", "torch without CUDA; versions alone, for its index has files of its own.", list(TORCH))
    return "versions alone"


def _write(name: str, what: str, packages: list[str]) -> None:
    path = LOCKS / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_HEAD.format(what) + "\n".join(packages) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(packages)} packages")


if __name__ == "__main__":
    sys.exit(main())

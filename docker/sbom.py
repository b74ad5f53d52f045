"""`make sbom`: what the images install from the locks, as CycloneDX JSON in docker/sbom, one file an image and variant.

It is made by cyclonedx-py, which uv fetches for the occasion. It lists the Python packages with the hashes of their
files; the packages of the base image are another's to list, from the image that was built (syft, trivy, docker sbom).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent / "locks"
FOLDER = Path(__file__).resolve().parent / "sbom"
TOOL = "cyclonedx-bom>=7,<8"


def main() -> int:
    """Write the files into docker/sbom, or the folder that is named; returns the exit status."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for image in ("service", "training"):
        for variant in ("cpu", "cuda"):
            locks = [LOCKS / f"torch-{variant}.txt", LOCKS / f"{image}.txt"]
            path = folder / f"{image}-{variant}.cdx.json"
            command = [sys.executable, "-m", "uv", "tool", "run", "--quiet", f"--from={TOOL}", "cyclonedx-py"]
            command += ["requirements", "--output-reproducible", "--output-format=JSON", f"--output-file={path}", "-"]
            subprocess.run(command, input="".join(lock.read_text("utf-8") for lock in locks), text=True, check=True)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

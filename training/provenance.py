"""What a result was made by."""

from __future__ import annotations

import subprocess


def commit() -> str:
    """The checkout's commit, or ``unknown``."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"

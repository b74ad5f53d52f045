"""Programs that tests run for real: where one is missing they fail and say how to get it, unless skips are allowed."""

from __future__ import annotations

import os
import shutil

import pytest

ALLOW_SKIPS = "IRONCLIP_ALLOW_SKIPS"
_ALLOWED = (
    os.environ.get(ALLOW_SKIPS) == "1"
)  # as it was at first: the suite takes it out, services know no such setting


def redis_installed() -> None:
    """Fail, or skip where that is allowed, without a redis-server: half of what the service promises hangs by it."""
    if shutil.which("redis-server") is not None:
        return
    if _ALLOWED:
        pytest.skip("there is no redis-server on this machine")
    pytest.fail(
        "There is no redis-server on this machine: apt-get install redis-server, or brew install redis. "
        f"{ALLOW_SKIPS}=1 leaves out what needs it.",
        pytrace=False,
    )

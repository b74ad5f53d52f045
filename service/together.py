"""Pieces of one request's work at a time: when one fails the others end too, and leave nothing in the queues."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any


async def together(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results in order; what the first to fail raises, once the others have been told to end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise

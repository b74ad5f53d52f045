"""Pieces of one request's work at a time: when one fails the others end too, and leave nothing in the queues."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from ironclip.errors import DeadlineExceeded, ImageError

# The work was done as far as it went: its points are not given back.
PAID_FOR = (ImageError, DeadlineExceeded)
# What a piece is cancelled with whose request came to nothing by no fault of the caller's: it gives back its points.
REFUSED = "another part of the request was refused"


async def together(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results in order; what the first to fail raises, once the others have been told to end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException as error:
        paid_for = isinstance(error, (*PAID_FOR, asyncio.CancelledError))
        for task in tasks:
            task.cancel(None if paid_for else REFUSED)
        raise

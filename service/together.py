"""Pieces of one request's work at a time: when one fails the others end too, and leave nothing in the queues.

Also what the failure of one piece means for the rest: whether the request ends with it, and whether it is paid for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from ironclip.errors import DeadlineExceeded, ImageError, LabelError, NotReady, Unavailable

# What a piece is cancelled with whose request came to nothing by no fault of the caller's: it gives back its points.
REFUSED = "another part of the request was refused"


async def together(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results in order; what the first to fail raises, once the others have been told to end."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException as error:
        kept = is_paid_for(error)
        for task in tasks:
            task.cancel(None if kept else REFUSED)
        raise


def is_paid_for(error: BaseException) -> bool:
    """Whether the work was done as far as it went, by no fault of the service: its points are not given back.

    A picture was unreadable, the caller went away, or the time that it allowed is over; not where the service gave the
    whole up before, with none of it begun.
    """
    if isinstance(error, asyncio.CancelledError):
        return error.args != (REFUSED,)
    return isinstance(error, ImageError) or (isinstance(error, DeadlineExceeded) and not error.unbegun)


def fault_of(outcomes: Sequence[object]) -> Exception | None:
    """Which of the outcomes of one request's items ends the whole request, if one does.

    An item keeps what is its own: what is wrong with its picture or its text, and that it ends the worker. All else is
    the service's: a worker that hangs or is gone, no memory (to a tower all items of a request are equally large, so
    what does not fit is no fault of one), what the queue gave up, and whatever the model raised. Answered item by item
    it would look like success, to those who count answers and to those who pay for them.

    Of several, what no other try mends goes first, and a deadline last, since points are kept for some of those.
    """
    faults = [outcome for outcome in outcomes if isinstance(outcome, Exception) and not _is_own(outcome)]
    fault = min(faults, key=_precedence, default=None)
    if isinstance(fault, DeadlineExceeded) and not all(isinstance(outcome, Exception) for outcome in outcomes):
        fault.unbegun = False
    return fault


def _is_own(error: Exception) -> bool:
    return isinstance(error, (ImageError, LabelError)) or (isinstance(error, NotReady) and error.by_item)


def _precedence(error: Exception) -> int:
    return isinstance(error, Unavailable) + isinstance(error, DeadlineExceeded)

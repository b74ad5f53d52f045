"""Whose turn it is: the class and the deadline of the request that is being worked on.

They travel with the task (a context variable), since they concern every queue on the way and none of the code between.
"""

from __future__ import annotations

import math
import re
from contextvars import ContextVar
from typing import NamedTuple

INTERACTIVE, BATCH = 0, 1
CLASSES = ("interactive", "batch")
# RFC 9218: 0 is the most urgent, 3 what is meant where nothing is said.
_MOST_URGENT_OF_BATCH = 4
_URGENCY = re.compile(r"(?:^|,)[ \t]*u[ \t]*=[ \t]*([0-7])[ \t]*(?=[,;]|$)")


class Urgency(NamedTuple):
    """Class of a request (INTERACTIVE goes before BATCH), and when it must be answered (monotonic clock, seconds)."""

    rank: int = INTERACTIVE
    deadline: float = math.inf


_UNSAID = Urgency()
CURRENT: ContextVar[Urgency] = ContextVar("urgency", default=_UNSAID)


def rank_of(priority: str) -> int:
    """The class that a `Priority` header (RFC 9218) asks for: `u=4` to `u=7` is batch; ignores what it cannot read."""
    found = _URGENCY.findall(priority) if priority else ()
    return BATCH if found and int(found[-1]) >= _MOST_URGENT_OF_BATCH else INTERACTIVE

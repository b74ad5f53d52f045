"""Ids of requests that come without one: 128 bits from the system, fetched for many at a time.

Asking the system for each takes as long as hashing a small picture.
"""

from __future__ import annotations

import os
import secrets

_DIGITS = 32
_AT_ONCE = 256
_left: list[str] = []
if hasattr(os, "register_at_fork"):  # or two processes would give the same ones
    os.register_at_fork(after_in_child=_left.clear)


def new_request_id() -> str:
    """32 hex digits; from any thread."""
    try:
        return _left.pop()
    except IndexError:
        digits = secrets.token_hex(_DIGITS * _AT_ONCE // 2)
        _left.extend(digits[at : at + _DIGITS] for at in range(_DIGITS, len(digits), _DIGITS))
        return digits[:_DIGITS]

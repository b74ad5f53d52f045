"""Signatures on what is kept where others can write: it is believed only as it was put, and where it was put."""

from __future__ import annotations

import hashlib
import hmac


class NotSigned(Exception):
    """The content was not signed with this secret, or not for where it stands."""


class Seal:
    """Signs content for a place.

    Args:
        secret: the same on all replicas; empty: nothing is signed, and everything is believed.
        purpose: what is signed; signatures of one purpose are worth nothing for another.
    """

    def __init__(self, secret: bytes = b"", purpose: bytes = b"") -> None:
        self._secret = hashlib.sha256(purpose + secret).digest() if secret else b""

    def close(self, place: str, content: bytes) -> bytes:
        """The content with its signature before it."""
        return self._mac(place, content) + b" " + content if self._secret else content

    def open(self, place: str, blob: bytes) -> bytes:
        """The content; raises NotSigned."""
        if not self._secret:
            return blob
        mac, _, content = blob.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(place, content)):
            raise NotSigned
        return content

    def _mac(self, place: str, content: bytes) -> bytes:
        where = place.encode()
        text = len(where).to_bytes(4, "big") + where + content
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest().encode()

"""How much memory bodies take while their requests are under way, and where it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ironclip.errors import InputTooLarge, Overloaded
from service.errors import ContentEncodingUnsupported


class Bodies:
    """The bytes of all bodies whose requests are not answered yet.

    Args:
        max_bytes: of one body.
        max_held_bytes: of all; those of one API key are a quarter of it at most, or one body.
    """

    def __init__(self, max_bytes: int, max_held_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_held_bytes = max_held_bytes
        self.share = max(max_bytes, max_held_bytes // 4)
        self.held = 0
        self.by_key: Counter[str] = Counter()


class Body:
    """The bytes of one request: its body, and what is fetched for it, which counts as if it had been sent.

    Args:
        bodies: of all requests.
        key: of who asks; "" where there are no keys.
    """

    __slots__ = ("_all", "_closed", "_key", "_size")

    def __init__(self, bodies: Bodies, key: str) -> None:
        self._all = bodies
        self._key = key
        self._size = 0
        self._closed = False

    def check(self, fields: Mapping[bytes, bytes]) -> None:
        """Look at a body's headers before it is asked for: a client that waits for "100 Continue" does not send it.

        Raises:
            ContentEncodingUnsupported, InputTooLarge: as their names say.
        """
        if fields.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise ContentEncodingUnsupported("Send the body plain: Content-Encoding is not read here.")
        length = fields.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._all.max_bytes:
            raise self._too_large()

    def hold(self, size: int) -> None:
        """Count bytes that have arrived.

        Raises:
            InputTooLarge: they are too many for one request.
            Overloaded: they are too many for its key, or for all requests together.
        """
        if self._closed:
            return  # what is still on its way to a request that has ended is dropped, and was never given back
        bodies, key = self._all, self._key
        self._size += size
        bodies.held += size
        if key:
            bodies.by_key[key] += size
        if self._size > bodies.max_bytes:
            raise self._too_large()
        if key and bodies.by_key[key] > bodies.share:
            raise Overloaded(
                f"The bodies of this API key's requests under way are over {bodies.share} bytes (a quarter of "
                "IRONCLIP_MAX_HELD_BYTES, or IRONCLIP_MAX_BODY_BYTES where that is more).",
                limit_name="held-bytes-of-key",
                retry_after=1,
                limit=bodies.share,
            )
        if bodies.held > bodies.max_held_bytes:
            raise Overloaded(
                f"The bodies of the requests under way are over {bodies.max_held_bytes} bytes "
                "(IRONCLIP_MAX_HELD_BYTES).",
                limit_name="held-bytes",
                retry_after=1,
                limit=bodies.max_held_bytes,
            )

    def close(self) -> None:
        """Give everything back."""
        self._closed = True
        bodies, key = self._all, self._key
        bodies.held -= self._size
        if key and self._size:
            bodies.by_key[key] -= self._size
            if bodies.by_key[key] <= 0:
                del bodies.by_key[key]

    def _too_large(self) -> InputTooLarge:
        limit = self._all.max_bytes
        return InputTooLarge(
            f"The request's body, and the images fetched for it, are over {limit} bytes. Send fewer images in "
            "one request, or raise IRONCLIP_MAX_BODY_BYTES.",
            limit=limit,
        )

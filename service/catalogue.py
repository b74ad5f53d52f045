"""What is served at the moment, by name: which version a request gets, and what can be said of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ironclip.errors import EncoderNotFound, NotReady
from service import telemetry
from service.runtime import ServedEncoder
from service.settings import DEFAULT_ALIAS, Settings
from service.versions import HELD, PIN_DIGITS, Named, Source, Version


class Catalogue:
    """Encoders by name.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._named: dict[str, Named] = {}

    @property
    def names(self) -> list[str]:
        """Of the encoders served, the settings' first."""
        return [name for name, named in self._named.items() if named.stable is not None]

    @property
    def served(self) -> list[ServedEncoder]:
        """The stable version of each name."""
        stable = (named.stable for named in self._named.values())
        return [version.served for version in stable if version is not None and version.served is not None]

    def standing(self, name: str) -> list[dict[str, Any]]:
        """Every version of a name, for answers; none where nothing is left of it."""
        return self._named.get(self.resolved(name), Named()).to_json()

    def pending(self) -> list[str]:
        """Names of which nothing is served: they are being loaded, or could not be."""
        return [name for name, named in self._named.items() if named.stable is None]

    def stable(self, name: str) -> ServedEncoder:
        """The stable version behind a name or `default`, to look at; a request that asks it wants `encoder`.

        Raises:
            NotReady, EncoderNotFound: as `encoder`.
        """
        version = self._named.get(self.resolved(name), Named()).stable
        if version is None or version.served is None:
            raise self._missing(self.resolved(name))
        return version.served

    def versions(self, name: str) -> list[str]:
        """Digests of the versions of a name that answer, the stable one first."""
        return [version.digest for version in self._named.get(self.resolved(name), Named()).serving]

    def encoder(self, reference: str) -> ServedEncoder:
        """The encoder for a request: of this name, of the alias `default`, or in the version `name@digest`.

        The request holds it to its end, and is given the same one when it asks again.

        Raises:
            NotReady: it is not loaded yet.
            EncoderNotFound: there is none of this name, or not in this version.
        """
        name, at, pin = reference.partition("@")
        name, held = self.resolved(name), HELD.get()
        version = held.find(name, pin) if held is not None else None
        if version is None:
            version = self._pinned(name, pin) if at else self._chosen(name, held.request_id if held is not None else "")
        if version.served is None:
            raise NotReady("This version of the encoder has been stopped.", retry_after=1)
        if held is not None:
            held.take(name, pin, version)
        return version.served

    def _chosen(self, name: str, request_id: str) -> Version:
        named = self._named.get(name)
        version = named.choose(request_id) if named is not None else None
        if named is not None and version is not None and version is named.canary and self._unfit(version):
            version = named.stable
        if version is None:
            raise self._missing(name)
        return version

    def _unfit(self, canary: Version) -> bool:
        """Whether a canary is out of service, found as it was about to be asked."""
        return False

    def _pinned(self, name: str, pin: str) -> Version:
        named = self._named.get(name, Named())
        for version in named.serving:
            if len(pin) >= PIN_DIGITS and version.digest.startswith(pin):
                return version
        if not named.serving:
            raise self._missing(name)
        raise EncoderNotFound(
            f"The encoder is not served in this version; there are: "
            f"{', '.join(telemetry.short(version.digest) for version in named.serving)}. A version is pinned by the "
            f"front of its digest, {PIN_DIGITS} digits at least."
        )

    def source(self, name: str) -> Source | None:
        """Who brought what is served or being loaded under a name, canaries apart; None: there is nothing."""
        named = self._named.get(name, Named())
        version = named.coming if named.coming is not None and not named.coming.share else named.stable
        return version.source if version is not None else None

    def loading(self, name: str) -> bool:
        """Whether a version of a name is being loaded."""
        return self._named.get(name, Named()).coming is not None

    def tried(self, name: str, source: Source) -> str:
        """Digest of the canary of a name that takes its share, if this source brought it; "" if not."""
        canary = self._named.get(name, Named()).canary
        return canary.digest if canary is not None and canary.source == source else ""

    def failure(self, name: str, *, canary: bool) -> dict[str, Any] | None:
        """Why what was loaded last for a name failed, as a problem, if it did, and was to be a canary, or not."""
        failed = self._named.get(name, Named()).failed
        return failed.failure if failed is not None and bool(failed.share) == canary else None

    def _everything(self) -> Iterator[ServedEncoder]:
        for named in self._named.values():
            yield from named.loaded

    def resolved(self, name: str) -> str:
        """The name that a name or the alias `default` stands for."""
        return self._settings.default_name if name == DEFAULT_ALIAS else name

    def _missing(self, name: str) -> NotReady | EncoderNotFound:
        """Why a name has no version that answers."""
        named = self._named.get(name)
        if name in self._settings.encoders or (named is not None and named.coming is not None):
            return NotReady("The encoder is not ready: it is being loaded, or could not be.", retry_after=1)
        return self._unknown()

    def _unknown(self) -> EncoderNotFound:
        return EncoderNotFound(
            f"No encoder of this name is served; there are: {', '.join(self.names)}, and the alias {DEFAULT_ALIAS!r}."
        )

"""Versions of encoders: the states that each goes through, the name that points to it, and the requests that hold it.

A request gets one version of a name and keeps it to its end, whatever the name points to by then: its answer is of one
piece, and the version is not stopped under it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from ironclip.defences import Defence
from service import telemetry
from service.runtime import ServedEncoder

State = Literal["loading", "verifying", "warming", "ready", "draining", "failed"]
Source = Literal["settings", "folder", "api"]
# What may follow each state; a version that has been drained is forgotten.
NEXT: dict[State, tuple[State, ...]] = {
    "loading": ("verifying", "failed"),
    "verifying": ("warming", "failed"),
    "warming": ("ready", "failed"),
    "ready": ("draining", "failed"),
    "draining": (),
    "failed": (),
}
Still = Callable[[], bool]
# Fewer digits of a digest may be met by chance; the Open Inference Protocol's versions have 12.
PIN_DIGITS = 8


def always() -> bool:
    """The files are what they were: nobody looks after them."""
    return True


@dataclass(eq=False)
class Version:
    """One set of weights under a name, from the moment it is asked for.

    Attributes:
        name: of the encoder.
        spec: as it was given.
        path: what is loaded: the spec, or the folder that it leads to.
        source: who brought it.
        defence: of requests that name none.
        share: of the name's requests, for a canary; 0 for the stable version.
        expected: digest that it must have; "" for any.
        still: whether its files are those that were seen, asked when they have been read.
        state: where it stands; `since` is from when on, in seconds of the epoch.
        digest: of the encoder, once it is loaded.
        notes: what whoever looks at it should know.
        failure: why it is not served, as a problem.
        served: the encoder behind its workers, while it is loaded.
        holders: requests that have it in hand.
        dropped: nobody wants it any more: it is not served when it has been loaded.
        lost: its workers have been given up.
    """

    name: str
    spec: str
    path: str
    source: Source
    defence: Defence
    share: float = 0.0
    expected: str = ""
    still: Still = always
    state: State = "loading"
    since: float = field(default_factory=time.time)
    digest: str = ""
    notes: list[str] = field(default_factory=list)
    failure: dict[str, Any] | None = None
    served: ServedEncoder | None = None
    holders: int = 0
    dropped: bool = False
    lost: bool = False

    def to(self, state: State) -> None:
        """Go to a state; raises RuntimeError for one that cannot follow."""
        if state not in NEXT[self.state]:
            raise RuntimeError(f"a version cannot go from {self.state} to {state}")
        self.state, self.since = state, time.time()

    def to_json(self, role: str, share: float) -> dict[str, Any]:
        """Its standing, for answers."""
        return {
            "role": role,
            "state": self.state,
            "share": share,
            "since": datetime.fromtimestamp(self.since, timezone.utc).isoformat(timespec="milliseconds"),
            "digest": self.digest or None,
            "spec": self.spec,
            "source": self.source,
            "defence": {"name": self.defence.name, **self.defence.options()},
            "requests_in_hand": self.holders,
            "notes": list(self.notes),
            "failure": self.failure,
        }


@dataclass(eq=False)
class Named:
    """What a name stands for: the stable version, perhaps a canary, one that comes, those that go, the last to fail."""

    stable: Version | None = None
    canary: Version | None = None
    coming: Version | None = None
    leaving: list[Version] = field(default_factory=list)
    failed: Version | None = None

    @property
    def serving(self) -> list[Version]:
        """Those that requests are given."""
        return [one for one in (self.stable, self.canary) if one is not None]

    @property
    def loaded(self) -> list[ServedEncoder]:
        """Those whose workers run."""
        return [one.served for one in [*self.serving, *self.leaving] if one.served is not None]

    def choose(self, request_id: str) -> Version | None:
        """The version for a request: the same for the same id, so that a retry meets the same weights."""
        canary = self.canary
        if canary is not None and request_id and draw(canary, request_id) < canary.share:
            return canary
        return self.stable

    def to_json(self) -> list[dict[str, Any]]:
        """The standing of every version."""
        share = self.canary.share if self.canary is not None else 0.0
        rows = [(self.stable, "stable", round(1 - share, 6)), (self.canary, "canary", share)]
        rows += [(self.coming, "coming", 0.0), *((one, "leaving", 0.0) for one in self.leaving)]
        rows += [(self.failed, "failed", 0.0)] if self.failed not in self.leaving else []
        return [one.to_json(role, part) for one, role, part in rows if one is not None]


def draw(version: Version, request_id: str) -> float:
    """A number in [0, 1) of a version and a request; a canary whose share grows keeps those that it has."""
    digest = hashlib.sha256(f"{version.name}\0{version.digest}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


class Held:
    """The versions that one request has in hand.

    Args:
        request_id: decides about canaries; "" for work that is never given one.

    Attributes:
        status: of the answer, as it is counted; 0: it is not.
    """

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self.status = 0
        self._found: dict[str, Version] = {}
        self._open = True

    @property
    def versions(self) -> list[Version]:
        """Those in hand, in the order in which they were asked for."""
        found = self._found
        return list(found.values()) if len(found) < 2 else list(dict.fromkeys(found.values()))

    def find(self, name: str, pin: str) -> Version | None:
        """What the request was given for this name, or for this name and front of a digest."""
        if not pin:
            return self._found.get(name)
        return next((one for one in self.versions if one.name == name and one.digest.startswith(pin)), None)

    def take(self, name: str, pin: str, version: Version) -> None:
        """Keep a version until the request's end."""
        if not self._open:
            return  # a piece of work that has outlived its request: queues that are not empty keep its version
        if version not in self._found.values():
            version.holders += 1
        self._found[f"{name}@{pin}" if pin else name] = version

    def release(self) -> None:
        """Let go of everything, and count the request."""
        self._open = False
        for version in self.versions:
            version.holders -= 1
            if version.served is not None:
                telemetry.count_version(version.name, version.digest, self.status)


HELD: ContextVar[Held | None] = ContextVar("held", default=None)


@contextmanager
def holding(request_id: str = "") -> Iterator[Held]:
    """Keep the versions that are asked for inside until the end of the block."""
    held = Held(request_id)
    token = HELD.set(held)
    try:
        yield held
    finally:
        HELD.reset(token)
        held.release()

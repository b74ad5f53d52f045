"""Locust's users of the service: pictures never seen, seen before, label sets, embeddings and probes.

Bodies are made before the load begins, so that a user costs no more than its request. A user who is refused with 429
or 503 waits as long as `Retry-After` asks, as a well-behaved caller does.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from locust import FastHttpUser, task

from loadtests.outcomes import ANSWERED, kind_of, row_name
from loadtests.pictures import make_pictures

LABELS = [f"label {number}" for number in range(20)]
LABEL_SET = "loadtest"
PROBE = {"labels": LABELS, "eps": [2], "effort": "quick", "seconds": 2}
_POPULAR = 16
_LONGEST_WAIT = 5.0


class Supply:
    """Bodies of all requests, made ahead.

    Args:
        count: distinct pictures for those who send one that was never seen; they come again after the last.
        size: of the pictures.
        seed: other seeds, other pictures; a service that was asked before knows those of the same seed.
    """

    def __init__(self, count: int, size: tuple[int, int], seed: int) -> None:
        pictures = make_pictures(size, count + _POPULAR, seed)
        self.made, self.asked = count, 0
        self._fresh = itertools.cycle(pictures[_POPULAR:])
        self.popular: Iterator[bytes] = itertools.cycle(pictures[:_POPULAR])
        self._asks = itertools.cycle([_asked(picture) for picture in pictures[_POPULAR:]])
        self.probes = itertools.cycle([_asked(picture, PROBE) for picture in pictures[:_POPULAR]])

    def fresh(self) -> bytes:
        """A picture that was not sent before, as long as there are any."""
        self.asked += 1
        return next(self._fresh)

    def fresh_ask(self) -> bytes:
        """The same within a classification's JSON, with labels of its own."""
        self.asked += 1
        return next(self._asks)


def _asked(picture: bytes, options: dict[str, Any] | None = None) -> bytes:
    return json.dumps({"image": base64.b64encode(picture).decode(), **(options or {"labels": LABELS})}).encode()


class ServiceUser(FastHttpUser):  # type: ignore[misc]
    """What all users share: the key, and how an answer is judged."""

    abstract = True

    def on_start(self) -> None:
        """Take the key from IRONCLIP_API_KEY, where it is set."""
        key = os.environ.get("IRONCLIP_API_KEY")
        self.key = {"Authorization": f"Bearer {key}"} if key else {}
        self.supply: Supply = self.environment.supply

    def ask(self, name: str, path: str, body: bytes, kind: str = "image/jpeg", method: str = "POST") -> None:
        """Send one request, counted under `name` and what became of it; a failure is named by status and code."""
        headers = {"Content-Type": kind, **self.key}
        with self.client.request(method, path, data=body, headers=headers, name=name, catch_response=True) as answer:
            told = answer.headers or {}
            kind = kind_of(answer.status_code, told.get("Cache-Status", ""))
            answer.request_meta["name"] = row_name(name, kind)
            if kind in ANSWERED:
                answer.success()
                return
            answer.failure(_reason(answer))
            wait = told.get("Retry-After", "")
        if wait.isdigit():
            time.sleep(min(float(wait), _LONGEST_WAIT))  # gevent's: locust has patched it


def _reason(answer: Any) -> str:
    try:
        problem = json.loads(answer.content)
    except (ValueError, TypeError):
        return f"status {answer.status_code}"
    return " ".join(str(part) for part in (answer.status_code, problem.get("code"), problem.get("limit_name")) if part)


class FreshUser(ServiceUser):
    """Classifies pictures that nobody has sent before, with labels of its own."""

    @task  # type: ignore[untyped-decorator]
    def classify(self) -> None:
        """JSON, base64."""
        self.ask("classify fresh", "/classify", self.supply.fresh_ask(), "application/json")


class RepeatedUser(ServiceUser):
    """Classifies pictures that were classified before, as a page does that is loaded again."""

    @task  # type: ignore[untyped-decorator]
    def classify(self) -> None:
        """The picture as the body, labels in the query."""
        labels = "&".join(f"labels=label%20{number}" for number in range(5))
        self.ask("classify repeated", f"/classify?{labels}", next(self.supply.popular))


class LabelSetUser(ServiceUser):
    """Classifies fresh pictures against a registered label set."""

    def on_start(self) -> None:
        """Register the set; the same again changes nothing."""
        super().on_start()
        body = json.dumps({"labels": LABELS, "templates": ["a photo of {}", "a picture of {}"]}).encode()
        self.ask("register label set", f"/label-sets/{LABEL_SET}", body, "application/json", "PUT")

    @task  # type: ignore[untyped-decorator]
    def classify(self) -> None:
        """The picture as the body."""
        self.ask("classify by label set", f"/classify?label_set={LABEL_SET}&top_k=3", self.supply.fresh())


class EmbedUser(ServiceUser):
    """Embeds fresh pictures."""

    @task  # type: ignore[untyped-decorator]
    def embed(self) -> None:
        """The picture as the body, the vector as base64."""
        self.ask("embed", "/embed?encoding_format=base64", self.supply.fresh())


class ProbeUser(ServiceUser):
    """Asks how easily a decision is fooled, and waits for the answer."""

    @task  # type: ignore[untyped-decorator]
    def probe(self) -> None:
        """One radius, two seconds at most."""
        self.ask("probe", "/attack-probe", next(self.supply.probes), "application/json")


# Scenarios by name, and how many of each hundred users are of which kind.
SCENARIOS: dict[str, dict[type[ServiceUser], int]] = {
    "classify": {FreshUser: 100},
    "repeated": {RepeatedUser: 100},
    "label-sets": {LabelSetUser: 100},
    "embed": {EmbedUser: 100},
    "probe": {ProbeUser: 100},
    "mix": {FreshUser: 40, RepeatedUser: 30, LabelSetUser: 18, EmbedUser: 10, ProbeUser: 2},
}

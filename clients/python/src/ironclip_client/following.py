"""A probe's server-sent events: bytes to events, what was seen, and when to ask again after a broken line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx

from ironclip_client import calls
from ironclip_client.errors import DeadlineExceeded, IronclipError, ProbeCancelled, UnexpectedAnswer
from ironclip_client.probes import ENDS, ProbeEvent, ProbeResult
from ironclip_client.sending import Config, Tries

# The service says something every 15 seconds, be it a comment; a line that is silent for longer is broken.
SILENCE_SECONDS = 40.0
# A line that has held for so long was a good one: that it breaks is not counted against it.
_HELD_SECONDS = 5.0


class EventParser:
    """Server-sent events from bytes, as the HTML standard has it; an event that is cut off is none."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[ProbeEvent]:
        """The events that these bytes complete.

        Raises:
            UnexpectedAnswer: an event whose data are no JSON object.
        """
        self._rest += data
        # A carriage return at the end may be half of a line's end.
        keep = b"\r" if self._rest.endswith(b"\r") else b""
        lines = self._rest[: len(self._rest) - len(keep)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + keep
        for line in lines:
            if line:
                name, _, value = line.decode("utf-8", "replace").partition(":")
                value = value.removeprefix(" ")
                known = self._fields.get(name)
                self._fields[name] = f"{known}\n{value}" if name == "data" and known is not None else value
            else:
                found, self._fields = self._fields, {}
                if "data" in found:
                    yield _event(found)


def _event(found: Mapping[str, str]) -> ProbeEvent:
    try:
        data = json.loads(found["data"])
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, Mapping):
        raise UnexpectedAnswer("An event of the probe holds no JSON object; is this an Ironclip service?")
    number = found.get("id", "")
    return ProbeEvent(found.get("event", "message"), data, int(number) if number.isdecimal() else None)


class Following:
    """Where somebody who follows a probe stands: its id, the last event seen, and the time that is left.

    Args:
        config: of the client.
        seconds: for all of it.
        id: of a probe that runs already; "" for one that is still to be started.
    """

    def __init__(self, config: Config, seconds: float, id: str = "") -> None:
        self._config, self.id, self._seconds = config, id, seconds
        self._end: float | None = None
        self._last: int | None = None
        self._last_kind = ""
        self._tries: Tries | None = None
        self._parser = EventParser()
        self._since = 0.0
        self.ended = False
        self.result: ProbeResult | None = None
        self._error: IronclipError | None = None

    @property
    def left(self) -> float:
        """Seconds until the time is up, from the first look on; not below 0."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        return max(0.0, self._end - time.monotonic())

    def request(self) -> dict[str, Any]:
        """The next request for its events, from behind the last one seen, as httpx takes it."""
        self.check()
        self._parser, self._since = EventParser(), time.monotonic()
        call = calls.probe_events(self.id, self._last)
        self._tries = self._tries or Tries(self._config, replace(call, timeout=self._seconds))
        asked = self._tries.request()
        asked["headers"].update(call.headers)
        asked["timeout"] = httpx.Timeout(max(0.001, min(self.left, SILENCE_SECONDS)), connect=min(5.0, self.left))
        return asked

    def answered(self, response: httpx.Response, body: bytes) -> None:
        """Raise the error that the answer is, if it is one; 204 says that nothing comes after the last event seen."""
        assert self._tries is not None
        self._tries.reply(response, body)
        self.ended = self.ended or response.status_code == 204

    def feed(self, data: bytes) -> Iterator[ProbeEvent]:
        """The events that these bytes complete, none twice.

        Raises:
            IronclipError: the probe has failed.
        """
        for event in self._parser.feed(data):
            if event.id is not None:
                if self._last is not None and event.id <= self._last:
                    continue
                self._last = event.id
            self._last_kind = event.kind
            self._tries = None  # it goes on: what was lost before counts no more
            if event.ends:
                self.ended = True
                self.result, self._error = event.result, event.error
            if self._error is not None:
                raise self._error
            yield event
        if not self.ended:  # else whoever takes long over the last event would be told that the probe did
            self.check()

    def check(self) -> None:
        """Raise DeadlineExceeded if the time is up."""
        if not self.left:
            raise DeadlineExceeded(f"The probe did not end within {self._seconds:g} s.")

    def broken(self, error: Exception | None) -> float:
        """Seconds to wait before the next request, after a line that broke (None: that ended too early).

        Raises:
            IronclipError: it has broken too often with nothing new between, or the time is up.
        """
        self.check()
        if self._tries is None or time.monotonic() - self._since > _HELD_SECONDS:
            self._tries = Tries(self._config, replace(calls.probe_events(self.id, None), timeout=self._seconds))
        if isinstance(error, httpx.ReadTimeout):
            error = httpx.ReadError(f"the events were silent for {SILENCE_SECONDS:g} s")
        return self._tries.after(error or httpx.RemoteProtocolError("the events ended before the probe did"))

    def answer(self) -> ProbeResult:
        """What it found; raises the error that it failed with, or ProbeCancelled if it was cancelled first."""
        if self._error is not None:
            raise self._error
        if self.result is None and self._last_kind not in ENDS:
            raise UnexpectedAnswer("The probe has ended, and how was told before: probe_get(id) has it.")
        if self.result is None:
            raise ProbeCancelled("The probe was cancelled before it had an answer.")
        return self.result

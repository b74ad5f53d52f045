"""An open-loop load: requests come when a Poisson process says so, whether or not the server keeps up.

A closed loop waits for the server before it asks again, so a slow server is asked less and looks better than it is
(coordinated omission). Here each request has its time beforehand, and its latency counts from then. The generator is a
process of its own (`python -m loadtests.open_loop`, a pickled `Plan` in, JSON out), whose event loop has nothing else
to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loadtests.client import exchange, percentile

# What a refused caller does: goes away; comes again when Retry-After says; comes again at once, as bad clients do.
Manner = Literal["leave", "honour", "storm"]
_STORM_SECONDS = 0.1
_KEPT_SECONDS = 4.0  # of a connection without a request; the shortest that a server here keeps one is 5
_TRIES = 3
_LIMIT_BYTES = 1 << 22


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        port: on 127.0.0.1.
        requests: complete requests, sent in turn.
        rate: arrivals a second, on average.
        seconds: over which they arrive.
        seed: of the arrival times.
        patience: seconds after its time at which a caller hangs up.
        manner: what a caller does who is answered 429 or 503.
        first: the place in `requests` of the first that is sent, so that a run after another goes on from there: a
            server that keeps answers is not asked again so soon.
    """

    port: int
    requests: list[bytes]
    rate: float
    seconds: float
    seed: int = 0
    patience: float = 30.0
    manner: Manner = "leave"
    first: int = 0


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
        due: when it had to be sent, seconds from the start.
        late: seconds after that at which the generator sent it; the generator's own fault.
        status: of the last answer; 0 for a connection that broke, -1 for a caller who hung up.
        latency: seconds from `due` to the last answer.
        answer_seconds: from the last try to its answer.
        limit: the limit that refused it last, as the problem names it.
        tries: requests that it took.
        retry_after: what the first refusal said, in seconds; None where it said nothing or there was none.
    """

    due: float
    late: float = 0.0
    status: int = 0
    latency: float = 0.0
    answer_seconds: float = 0.0
    limit: str = ""
    tries: int = 0
    retry_after: float | None = None


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` a second, over `seconds`."""
    draw = random.Random(seed)
    times: list[float] = []
    now = draw.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += draw.expovariate(rate)
    return times


class _Caller:
    """Keeps connections that are free, and sends one request after its time has come."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []  # and since when

    async def call(self, request: bytes, start: float, outcome: Outcome) -> None:
        """Send one request until it is answered, given up or refused for good."""
        try:
            await asyncio.wait_for(self._tries(request, start, outcome), self.plan.patience)
        except (TimeoutError, asyncio.TimeoutError):
            outcome.status = -1
        except (OSError, asyncio.IncompleteReadError):
            outcome.status = 0
        outcome.latency = time.monotonic() - start - outcome.due

    async def _tries(self, request: bytes, start: float, outcome: Outcome) -> None:
        while True:
            outcome.tries += 1
            began = time.monotonic()
            pause = await self._send(request, outcome)
            outcome.answer_seconds = time.monotonic() - began
            if outcome.status not in (429, 503) or outcome.tries == _TRIES or self.plan.manner == "leave":
                return
            await asyncio.sleep(pause if self.plan.manner == "honour" else _STORM_SECONDS)

    async def _send(self, request: bytes, outcome: Outcome) -> float:
        """Send it once; returns after how many seconds it may come again."""
        reader, writer = await self._connection()
        try:
            reply = await exchange(reader, writer, request)
        except BaseException:
            writer.close()
            raise
        if reply.header("connection").lower() == "close":
            writer.close()
        else:
            self._free.append((reader, writer, time.monotonic()))
        outcome.status = reply.status
        if reply.status == 200:
            return 0.0
        with contextlib.suppress(ValueError, AttributeError):
            outcome.limit = str(json.loads(reply.body).get("limit_name", ""))
        given = reply.header("retry-after")
        pause = float(given) if given.isdigit() else None
        if outcome.retry_after is None:
            outcome.retry_after = pause
        return 1.0 if pause is None else pause

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A free connection that the server will not close just now, or a new one: to close it is no fault of its."""
        while self._free:
            reader, writer, since = self._free.pop()
            if not reader.at_eof() and time.monotonic() - since < _KEPT_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.plan.port, limit=_LIMIT_BYTES)

    def close(self) -> None:
        """Close the free connections."""
        for _, writer, _ in self._free:
            writer.close()


async def send(plan: Plan) -> list[Outcome]:
    """Send the plan's requests at their times and wait for all answers."""
    outcomes = [Outcome(due) for due in arrivals(plan.rate, plan.seconds, plan.seed)]
    caller = _Caller(plan)
    tasks = []
    start = time.monotonic()
    for number, outcome in enumerate(outcomes):
        # After a stall everything that has become due is sent at once, and is late by what `late` says.
        pause = start + outcome.due - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        outcome.late = max(0.0, time.monotonic() - start - outcome.due)
        tasks.append(
            asyncio.ensure_future(
                caller.call(plan.requests[(plan.first + number) % len(plan.requests)], start, outcome)
            )
        )
    await asyncio.gather(*tasks)
    caller.close()
    return outcomes


def run(plan: Plan) -> list[Outcome]:
    """Send the plan from a process of its own.

    Raises:
        RuntimeError: that process failed, with the end of what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.open_loop"],
        input=pickle.dumps(plan),
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        timeout=plan.seconds + plan.patience + 60,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
    return [Outcome(**one) for one in json.loads(done.stdout)]


def summarise(outcomes: Sequence[Outcome], plan: Plan, deadline: float, warm: float = 0.0) -> dict[str, Any]:
    """Numbers of one run; what was due in its first `warm` seconds is left out.

    Goodput is answers of status 200 within `deadline` seconds of their time, per second. It and `answered_per_second`
    count what was answered between `warm` and the last request's time, whenever that was due: a queue that is longer at
    the end than at the beginning would count as throughput otherwise. Percentiles are of all that were answered 200.
    `admitted_p99_ms` and `good_tries_per_second` count from the try that was let in, so a caller's own pauses are not
    in them.
    """
    counted = [one for one in outcomes if one.due >= warm]
    span = plan.seconds - warm
    answered = [one for one in counted if one.status == 200]
    meanwhile = [one for one in outcomes if one.status == 200 and warm <= one.due + one.latency < plan.seconds]
    latencies = [one.latency for one in answered]
    good = sum(latency <= deadline for latency in latencies)
    refused = [one for one in counted if one.limit or one.retry_after is not None or one.status in (429, 503)]
    again = [one for one in counted if one.tries > 1]
    return {
        "offered_per_second": round(len(counted) / span, 3),
        "answered_per_second": round(len(meanwhile) / span, 3),
        "goodput_per_second": round(sum(one.latency <= deadline for one in meanwhile) / span, 3),
        "good_tries_per_second": round(sum(one.answer_seconds <= deadline for one in meanwhile) / span, 3),
        "requests": len(counted),
        "good": good,
        **{f"p{round(100 * share)}_ms": _milliseconds(percentile(latencies, share)) for share in (0.5, 0.95, 0.99)},
        "admitted_p99_ms": _milliseconds(percentile([one.answer_seconds for one in answered], 0.99)),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in counted).items())},
        "limits": dict(Counter(one.limit for one in counted if one.limit).most_common()),
        "refused": len(refused),
        "refused_with_retry_after": sum(one.retry_after is not None for one in refused),
        "retry_after_seconds_mean": _mean([one.retry_after for one in refused if one.retry_after is not None]),
        "came_again": len(again),
        "came_again_and_answered": sum(one.status == 200 for one in again),
        "tries": sum(one.tries for one in counted),
        "sent_late_p99_ms": _milliseconds(percentile([one.late for one in counted], 0.99)),
    }


def _milliseconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(1000 * seconds, 2)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def main() -> int:
    """Read a plan, send it, write the outcomes."""
    plan: Plan = pickle.load(sys.stdin.buffer)  # written by `run`, just now
    gc.freeze()
    gc.disable()  # a collection would make what is due then late; the process is short
    outcomes = asyncio.run(send(plan))
    json.dump([asdict(one) for one in outcomes], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
